"""All families, and which of them can hold a model of ours: the one through whose config it passes unchanged."""

from __future__ import annotations

import dataclasses
import re

import torch

from megatron_ds.convert.bert import BERT, BERT_MASKED, MEGATRON_BERT, MEGATRON_BERT_MASKED
from megatron_ds.convert.blenderbot import BLENDERBOT
from megatron_ds.convert.bloom import BLOOM
from megatron_ds.convert.family import Family, Fields
from megatron_ds.convert.gpt2 import GPT2
from megatron_ds.convert.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_ds.convert.neox import NEOX
from megatron_ds.convert.t5 import T5
from megatron_ds.convert.weights import Weights
from megatron_ds.errors import CheckpointError

FAMILIES = (
    *(GPT2, NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, BLOOM),
    *(BERT, MEGATRON_BERT, BERT_MASKED, MEGATRON_BERT_MASKED),
    *(T5, BLENDERBOT),
)

_NORM_WEIGHT = re.compile(r"(.*\.)?(\w*layernorm|norm)\.weight")


def family_of(fields: Fields) -> Family:
    """The family that a config.json names.

    Raises: CheckpointError for one that we do not read
    """
    key, classes = fields.get("model_type", default=""), fields.get("architectures", default=[])
    fitting = [family for family in FAMILIES if family.key == key]
    if not fitting:
        known = ", ".join(dict.fromkeys(family.key for family in FAMILIES))
        raise fields.misfit("model_type", key, f"one of {known}")
    fields.only("quantization_config", None)
    return next((family for family in fitting if family.name in classes), fitting[0])


def find_home(weights: Weights) -> Family:
    """The class that computes just what this model does; where several do, the one that it came from, else the first.

    Raises: CheckpointError if there is none, with every candidate's reason
    """
    config, reasons = weights.config, dict[str, str]()
    if config.model_type == "BERT" and config.kernel == "gelu_tanh" and not config.openai_gelu:
        raise CheckpointError(
            "--saver hf",
            "a BERT with GELU's tanh form in its layers and GELU by erf in its head, Megatron's default",
            "one form: the classes of Hugging Face have one for both",
            "train with --no-bias-gelu-fusion (erf) or --openai-gelu (tanh); tools/forward.py runs it as it is",
        )
    fitting = []
    for family in FAMILIES:
        if family.of == weights.config.model_type:
            reason = _misfit(family, weights)
            if reason:
                reasons[family.name] = reason
            else:
                fitting.append(family)
    for family in fitting:
        if family.name == weights.home:
            return family
    if fitting:
        return fitting[0]
    raise CheckpointError(
        "--saver hf",
        "a model that no class of Hugging Face computes\n"
        + "\n".join(f"      {name}: {reason}" for name, reason in reasons.items()),
        "one of these classes",
        "keep it in its own format, in which tools/forward.py runs it",
    )


def _misfit(family: Family, weights: Weights) -> str:
    """What of the model is lost on the way to the family's config and back; nothing if it fits."""
    written = family.fields(weights.config, weights.max_positions)
    untied = weights.config.untie_embeddings_and_output_weights and bool(family.head)
    try:
        back = family.config(Fields({**written, "tie_word_embeddings": not untied}, family.name, untied))
    except CheckpointError as error:
        return f"{error.subject.removeprefix(f'{family.name}: ')} {error.found}"
    ours, theirs = weights.config.architecture(), back.architecture()
    lost = [f"{flag}: {ours[flag]} here, {theirs[flag]} there" for flag in ours if ours[flag] != theirs[flag]]
    return "; ".join(lost[:4]) + (f"; {len(lost) - 4} more" if len(lost) > 4 else "")


def folded(weights: Weights) -> Weights:
    """The same model with plain norms: where the stored weight is w - 1, w, in fp32 so that nothing is rounded."""
    if not weights.config.apply_layernorm_1p:
        return weights

    def read(name: str) -> torch.Tensor:
        tensor = weights.read(name)
        return tensor.float() + 1 if _NORM_WEIGHT.fullmatch(name) else tensor

    return dataclasses.replace(weights, config=dataclasses.replace(weights.config, apply_layernorm_1p=False), read=read)
