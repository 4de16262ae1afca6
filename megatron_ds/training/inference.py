"""A whole model on one process, read from a checkpoint of any layout, and text from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_ds.checkpoint.load import find, load
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import Tokenizer, build_tokenizer
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.gpt import GPTModel, Stage
from megatron_ds.training.resume import stored_model


class Trained(NamedTuple):
    """A model that was trained, its tokenizer, and where it comes from."""

    model: GPTModel
    tokenizer: Tokenizer
    seq_length: int
    iteration: int


def load_trained(directory: str, step: int | None = None, device: str = "cpu") -> Trained:
    """Rebuild the model that a checkpoint describes and fill it.

    Raises: CheckpointError, DataError if the tokenizer's files are gone
    """
    found = find(directory, step)
    state = found.index.state
    config = stored_model(found.index)
    assert config.num_layers
    vocab = Vocab(state["vocab_size"], state["vocab_size"])
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(state["dtype"], torch.float32)
    model = GPTModel(
        config,
        vocab,
        Stage(0, config.num_layers, True, True),
        max_positions=state["max_positions"],
        device=device,
        dtype=dtype,
    )
    table = model.table()
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    load(found.index, [p for n, spec in table.items() for p in spec.pieces(values[n], 0, 1, f"model/{n}")])
    tokenizer = build_tokenizer(TokenizerConfig(**state["tokenizer"]), "GPT2BPETokenizer")
    return Trained(model.eval(), tokenizer, state["seq_length"], found.iteration)


@torch.inference_mode()
def generate(
    trained: Trained, prompt: Sequence[int], new_tokens: int, *, temperature: float, top_k: int, seed: int
) -> list[int]:
    """Continue a prompt, token by token; temperature 0 always takes the likeliest. Stops at the end of the document.

    Each token is computed from the last `seq_length` tokens anew.

    Raises: ConfigError for numbers that mean nothing, DataError for a prompt with ids that the model does not have
    """
    _check_request(trained, prompt, new_tokens, temperature, top_k)
    device = next(trained.model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(new_tokens):
        window = torch.tensor([ids[-trained.seq_length :]], device=device)
        positions = torch.arange(window.shape[1], device=device)[None]
        logits = trained.model(window, positions)[-1, 0].float().cpu()
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            best = logits.topk(min(top_k or len(logits), len(logits)))
            weights = (best.values / temperature).softmax(-1)
            choice = int(best.indices[torch.multinomial(weights, 1, generator=generator)])
        if choice == trained.tokenizer.eod:
            break
        ids.append(choice)
    return ids


def _check_request(trained: Trained, prompt: Sequence[int], new_tokens: int, temperature: float, top_k: int) -> None:
    for flag, value in (("--max-new-tokens", new_tokens), ("--temperature", temperature), ("--top-k", top_k)):
        if not 0 <= value < math.inf:
            raise ConfigError(flag, str(value), "a finite number, 0 or more", f"{flag} 0, or leave it out")
    outside = [token for token in prompt if not 0 <= token < trained.model.vocab.size]
    if outside:
        raise DataError("--prompt", f"token id {outside[0]}", f"0 to {trained.model.vocab.size - 1}", "another prompt")
