"""Both sides on the same prompts: our model from our checkpoint, transformers' from theirs, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.model.config import ModelType
from megatron_ds.training.inference import load_trained
from megatron_ds.training.outputs import model_outputs

TOLERANCE = 1e-4
"""Largest difference of two logits in fp32 that is rounding."""
LENGTHS = (1, 7, 40, 150)
_SEED = 1234
_TEXTS = ("The house, built  twice.", "  def f(x):\n\treturn x + 12345", "na\u00efve \u65e5\u672c", "'tis I'll")
Prompt = Mapping[str, torch.Tensor]


def prompts(kind: ModelType, vocab_size: int, max_positions: int) -> list[dict[str, torch.Tensor]]:
    """Random ids, the same in every run, under the names of transformers; two segments for BERT, two stacks for T5.

    Shapes: each [1, n]
    """
    generator = torch.Generator().manual_seed(_SEED)
    found = []
    for length in LENGTHS:
        s = min(length, max_positions)
        prompt = {"input_ids": torch.randint(vocab_size, (1, s), generator=generator)}
        if kind == "BERT":
            prompt["token_type_ids"] = (torch.arange(s) >= (s + 1) // 2).long()[None]
        if kind == "T5":
            prompt["decoder_input_ids"] = torch.randint(vocab_size, (1, (s + 1) // 2), generator=generator)
        found.append(prompt)
    return found


def difference(ours: Path, theirs: Path, kind: str, *, loads_all: bool, step: int | None = None) -> float:
    """Largest difference between two logits of the same prompt, BERT's two of the order of segments among them.

    kind: class of transformers. step: iteration of ours. loads_all: fail where transformers finds tensors missing or
    left over; files of others may hold old buffers.
    Raises: ConfigError without transformers, CheckpointError from either side
    """
    trained = load_trained(str(ours), step, fp32=True)
    config = trained.config
    asked = prompts(config.model_type, trained.vocab.size, trained.max_positions)
    if not config.has_sentence_order:
        asked = [{name: ids for name, ids in prompt.items() if name != "token_type_ids"} for prompt in asked]
    mine = [model_outputs(trained, prompt, micro_batch_size=1) for prompt in asked]
    del trained
    model = _open_theirs(theirs, kind, loads_all)
    worst = 0.0
    with torch.inference_mode():
        for prompt, found in zip(asked, mine, strict=True):
            output = model(**prompt, attention_mask=torch.ones_like(prompt["input_ids"]))
            pairs = {"logits": output.get("logits", output.get("prediction_logits"))}
            pairs["seq_relationship_logits"] = output.get("seq_relationship_logits")
            for name, logits in pairs.items():
                if logits is not None:
                    gap = (found[name] - logits.float()).abs().max().item()
                    worst = max(worst, float("inf") if gap != gap else gap)
    return worst


def same_ids(tokenizer: Tokenizer, directory: Path) -> bool:
    """Whether transformers' tokenizer of that directory gives the ids that ours does; special tokens around them aside.

    Raises: ConfigError without transformers
    """
    theirs = _transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return all(
        tokenizer.tokenize_batch([text], bare=True)[0] == theirs(text, add_special_tokens=False)["input_ids"]
        for text in _TEXTS
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "--saver, --loader hf",
            "no package transformers, which would run the model for comparison",
            "pip install 'megatron-ds[hf]'",
            "install it, or --no-check to do without the proof",
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _open_theirs(directory: Path, kind: str, loads_all: bool) -> Any:
    transformers = _transformers()
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model, report = getattr(transformers, kind).from_pretrained(
        directory,
        local_files_only=True,
        attn_implementation="eager",
        output_loading_info=True,
        **{dtype: torch.float32},
    )
    troubles = [f"{what}: {', '.join(sorted(map(str, names))[:4])}" for what, names in report.items() if names]
    if troubles and loads_all:
        raise CheckpointError(str(directory), "; ".join(troubles), f"every tensor of {kind}, and no other")
    return model.eval()
