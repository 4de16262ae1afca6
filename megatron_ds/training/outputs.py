"""What a model makes of given inputs, under the names that transformers gives to inputs and outputs.

GPT    input_ids, attention_mask, position_ids, labels     -> logits, loss
BERT   input_ids, attention_mask, token_type_ids,          -> logits (also prediction_logits), lm_loss,
       position_ids, labels, next_sentence_label              seq_relationship_logits, sop_loss, loss
T5     input_ids, attention_mask, decoder_input_ids,       -> logits, loss
       labels
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ds.errors import DataError
from megatron_ds.training.inference import Inputs, Trained, run, whole_vocabulary

IGNORED = -100
"""A label that is not predicted."""

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "GPT": ("input_ids", "attention_mask", "position_ids", "labels"),
        "BERT": (
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "position_ids",
            "labels",
            "next_sentence_label",
        ),
        "T5": ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels"),
    }
)
Tensors = Mapping[str, torch.Tensor]


def model_outputs(
    trained: Trained, given: Tensors, *, micro_batch_size: int, decoder_start_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """Outputs in fp32 on the CPU of the rank that writes; nothing on the others.

    Where attention_mask is 0, logits mean nothing.
    Raises: DataError for inputs that the model cannot read
    """
    check_inputs(trained, given)
    kind = trained.config.model_type
    logits: list[torch.Tensor] = []
    binary: list[torch.Tensor] = []

    def collect(number: int, output: Any) -> None:
        words, order = output if kind == "BERT" else (output, None)
        whole = whole_vocabulary(words.transpose(0, 1), trained)
        if trained.writes:
            logits.append(whole.cpu())
            binary.extend(() if order is None else (order.float().cpu(),))

    run(trained, list(_inputs(kind, given, decoder_start_token_id).microbatches(micro_batch_size)), collect)
    if not trained.writes:
        return {}
    found = {"logits": torch.cat(logits)}
    if kind == "BERT":
        found["prediction_logits"] = found["logits"]
    if binary:
        found["seq_relationship_logits"] = torch.cat(binary)
    return found | _losses(kind, found, given)


def _inputs(kind: str, given: Tensors, decoder_start_token_id: int) -> Inputs:
    ids, mask = given["input_ids"], given.get("attention_mask")
    decoder = given.get("decoder_input_ids")
    if kind == "T5" and decoder is None:
        decoder = shifted_right(given["labels"], decoder_start_token_id)
    # On the right of a causal model's tokens padding is out of sight anyway.
    hidden = None if mask is None or (kind == "GPT" and bool((mask[:, 1:] <= mask[:, :-1]).all())) else 1 - mask
    positions = given.get("position_ids")
    positions = positions if positions is None else positions.expand_as(ids)
    return Inputs(ids, positions, hidden, given.get("token_type_ids"), decoder)


def shifted_right(labels: torch.Tensor, start: int) -> torch.Tensor:
    """Decoder inputs that these labels follow from; what is ignored becomes id 0, as in transformers.

    Shapes: [b, s] -> [b, s]
    """
    moved = labels.roll(1, dims=1)
    moved[:, 0] = start
    return moved.masked_fill(moved == IGNORED, 0)


def _losses(kind: str, found: Tensors, given: Tensors) -> dict[str, torch.Tensor]:
    """Means over what is not ignored; BERT's loss is the sum of those whose labels are there."""
    labels, order = given.get("labels"), given.get("next_sentence_label")
    parts = {}
    if labels is not None:
        logits = found["logits"]
        if kind == "GPT":
            logits, labels = logits[:, :-1], labels[:, 1:]
        parts["lm_loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    if order is not None:
        parts["sop_loss"] = F.cross_entropy(found["seq_relationship_logits"], order.flatten(), ignore_index=IGNORED)
    if not parts:
        return {}
    return {"loss": torch.stack(list(parts.values())).sum()} | (parts if kind == "BERT" else {})


def check_inputs(trained: Trained, given: Tensors) -> None:
    """Whether the model can read these inputs.

    Raises: DataError that names the first array that it cannot
    """
    config, kind = trained.config, trained.config.model_type
    names = NAMES[kind]
    for name in given:
        if name not in names:
            raise _wrong(name, f"an input that {kind} does not read", f"some of {', '.join(names)}", "leave it out")
    if "input_ids" not in given or (kind == "T5" and not given.keys() & {"labels", "decoder_input_ids"}):
        missing = "labels or decoder_input_ids" if "input_ids" in given else "input_ids"
        raise _wrong(missing, f"only {', '.join(given) or 'nothing'}", f"{missing}, for {kind}", "add it to the .npz")
    _check_shapes(kind, given)
    sizes = {
        "input_ids": trained.vocab.size,
        "decoder_input_ids": trained.vocab.size,
        "labels": trained.vocab.size,
        "attention_mask": 2,
        "decoder_attention_mask": 2,
        "token_type_ids": 2,
        "next_sentence_label": 2,
        "position_ids": trained.max_positions if config.positions == "learned_absolute" else 1 << 31,
    }
    for name, values in given.items():
        ignored = name in ("labels", "next_sentence_label")
        outside = values[((values < 0) | (values >= sizes[name])) & ~((values == IGNORED) & ignored)]
        if outside.numel():
            expected = f"0 to {sizes[name] - 1}" + (f", or {IGNORED} to ignore" if ignored else "")
            raise _wrong(name, f"the value {int(outside[0])}", expected, "ids of this model's tokenizer and positions")
        sequence = values.dim() == 2 and name != "next_sentence_label"
        if config.positions == "learned_absolute" and sequence and values.shape[1] > trained.max_positions:
            found, expected = f"{values.shape[1]} positions", f"at most {trained.max_positions}"
            raise _wrong(name, found, f"{expected}, the rows of the position table", "shorter sequences")
    if "position_ids" in given and config.positions not in ("learned_absolute", "rope"):
        raise _wrong(
            "position_ids", f"a model with {config.positions} positions", "learned or rotary ones", "leave it out"
        )
    if "next_sentence_label" in given and not config.has_sentence_order:
        raise _wrong("next_sentence_label", "a model without a binary head", "one with it", "leave it out")
    if "token_type_ids" in given and not config.has_sentence_order and bool(given["token_type_ids"].any()):
        raise _wrong("token_type_ids", "a second segment", "zeros, for a model without token types", "leave it out")
    _check_masks(kind, given)


def _check_shapes(kind: str, given: Tensors) -> None:
    """[b, s] all of them, but what belongs to the decoder has a length of its own."""
    shape = tuple(given["input_ids"].shape)
    if len(shape) != 2 or not all(shape):
        raise _wrong("input_ids", f"shape {list(shape)}", "[batch, sequence], neither of them 0", "a row per sequence")
    target = given.get("decoder_input_ids", given.get("labels", given["input_ids"]))
    decoder = (shape[0], *target.shape[1:2])
    for name, values in given.items():
        allowed = [decoder if kind == "T5" and name not in ("input_ids", "attention_mask") else shape]
        if name == "next_sentence_label":
            allowed = [shape[:1], (shape[0], 1)]
        if name == "position_ids":
            allowed.append((1, shape[1]))
        if tuple(values.shape) not in allowed or not values.numel():
            expected = " or ".join(str(list(one)) for one in allowed)
            raise _wrong(name, f"shape {list(values.shape)}", expected, f"{name} that fits the others")


def _check_masks(kind: str, given: Tensors) -> None:
    """Padding stands where its meaning is plain, and nothing is predicted from it."""
    mask, decoder = given.get("attention_mask"), given.get("decoder_attention_mask")
    if mask is not None and not bool(mask.any(1).all()):
        raise _wrong("attention_mask", "a row of zeros", "a token to attend to in every row", "leave that row out")
    if kind == "GPT" and mask is not None and bool((mask.diff(dim=1) != 0).sum(1).gt(1).any()):
        raise _wrong("attention_mask", "zeros between ones", "padding on one side", "no gaps within a sequence")
    if decoder is not None and bool((decoder.diff(dim=1) > 0).any()):
        raise _wrong("decoder_attention_mask", "zeros before ones", "padding on the right", "labels of -100 there")
    labels, mask = given.get("labels"), decoder if kind == "T5" else mask
    if mask is None or labels is None:
        return
    # A prediction is made where the input stands: of a causal model one place before its label.
    read, wanted = (mask[:, :-1], labels[:, 1:]) if kind == "GPT" else (mask, labels)
    if bool(((read == 0) & (wanted != IGNORED)).any()):
        found, expected = "a label that is predicted from padding", f"{IGNORED} there"
        raise _wrong("labels", found, expected, "labels[mask == 0] = -100, and a GPT's first token behind padding")


def _wrong(name: str, found: str, expected: str, fix: str) -> DataError:
    return DataError(f"--input: {name}", found, expected, fix)
