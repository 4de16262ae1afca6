"""Rows of a dataset to batches: one class per model, and how its rows become it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megatron_ds.data.config import DataConfig
from megatron_ds.errors import ConfigError, DataError

B = TypeVar("B", bound="Batch")
Collate = Callable[[Sequence[Any]], Any]
"""Rows -> batch."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch; fields are tensors or None."""

    def to(self: B, device: torch.device | str) -> B:
        """The same batch on a device."""
        return self._each(lambda name, tensor: tensor.to(device, non_blocking=True))

    def pinned(self: B) -> B:
        """The same batch in memory from which a GPU copies while it computes; what is on one stays there."""
        return self._each(lambda name, tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _each(self: B, change: Callable[[str, torch.Tensor], torch.Tensor]) -> B:
        values = {field.name: vars(self)[field.name] for field in fields(self)}
        return type(self)(**{name: None if t is None else change(name, t) for name, t in values.items()})


@dataclass(frozen=True)
class GPTBatch(Batch):
    """One micro-batch of GPT.

    documents: tokens see only tokens of the same number; None where a sample is one document.
    Shapes: each [b, s]; int64, but loss_mask float32
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    documents: torch.Tensor | None = None

    def at(self, positions: torch.Tensor) -> GPTBatch:
        """The given positions of every sequence; documents stay whole, for attention sees the whole sequence.

        Shapes: positions [n] -> each [b, n]
        """
        return self._each(lambda name, tensor: tensor if name == "documents" else tensor[:, positions])


@dataclass(frozen=True)
class BERTBatch(Batch):
    """One micro-batch of BERT.

    labels: 0 where loss_mask is 0. documents: 0 for tokens, 1 for padding. is_random: 1 where the segments are swapped.
    Shapes: each [b, s], but is_random [b]; int64, but loss_mask float32
    """

    tokens: torch.Tensor
    token_types: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    documents: torch.Tensor
    is_random: torch.Tensor
    position_ids: torch.Tensor
    order_mask: torch.Tensor
    """1 where this part of the batch has the first position, which alone the order is read from; [b], float32."""

    def at(self, positions: torch.Tensor) -> BERTBatch:
        """The given positions of every sequence; documents stay whole, for attention sees the whole sequence.

        Shapes: positions [n] -> [b, n]
        """
        kept = ("documents", "is_random", "order_mask")
        cut = self._each(lambda name, tensor: tensor if name in kept else tensor[:, positions])
        return replace(cut, order_mask=self.order_mask * (positions == 0).any())

    def num_targets(self) -> torch.Tensor:
        """Masked tokens, and samples.

        Shapes: -> [2]
        """
        return torch.stack((self.loss_mask.sum(), self.order_mask.sum()))


@dataclass(frozen=True)
class T5Batch(Batch):
    """One micro-batch of T5.

    labels: 0 where loss_mask is 0. encoder_documents: 0 for tokens, 1 for padding.
    Shapes: encoder's [b, se], the others [b, sd]; int64, but loss_mask float32
    """

    encoder_tokens: torch.Tensor
    decoder_tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    encoder_documents: torch.Tensor


def collate_for(model_type: str, config: DataConfig, eod: int | None) -> Collate:
    """How a model's rows become batches.

    Raises: ConfigError for an option that looks for ends of documents where nothing names their token
    """
    if model_type != "GPT":
        return collate_bert if model_type == "BERT" else collate_t5
    if eod is None and (config.eod_mask_loss or config.reset_position_ids or config.reset_attention_mask):
        raise ConfigError(
            "--eod-mask-loss, --reset-position-ids, --reset-attention-mask",
            found="no tokenizer",
            expected="one that ends documents",
        )
    return partial(collate_gpt, config=config, eod=eod)


def blank_batch(model_type: str, config: DataConfig, rows: int) -> GPTBatch | BERTBatch | T5Batch:
    """A batch of zeros, of the shapes that samples have."""
    assert config.seq_length
    tokens = torch.zeros(rows, config.seq_length, dtype=torch.int64)
    mask, one = torch.ones(rows, config.seq_length), torch.zeros(rows, dtype=torch.int64)
    if model_type == "GPT":
        return GPTBatch(tokens, tokens, mask, tokens, tokens if config.reset_attention_mask else None)
    if model_type == "BERT":
        return BERTBatch(tokens, tokens, tokens, mask, tokens, one, tokens, torch.ones(rows))
    target = torch.zeros(rows, config.decoder_seq_length or 0, dtype=torch.int64)
    return T5Batch(tokens, target, target, torch.ones(target.shape), tokens)


def collate_gpt(
    rows: Sequence[npt.NDArray[np.int64] | Mapping[str, Any]], config: DataConfig, eod: int | None
) -> GPTBatch:
    """Inputs, and as labels the same tokens one to the left; the options look at where the input is `eod`.

    A row is the s + 1 tokens, or a mapping with them under "text", or with tokens and labels and whatever else of
    loss_mask and position_ids is to be as given.
    Shapes: rows [s + 1] -> [b, s]
    """
    first, given = rows[0], dict[str, npt.NDArray[Any]]()
    if isinstance(first, Mapping) and "tokens" in first:
        given = {name: np.stack([np.asarray(_at(row, name)) for row in rows]) for name in first if name in _GIVEN}
        tokens, labels = given["tokens"].astype(np.int64), given["labels"].astype(np.int64)
    else:
        text = np.stack([np.asarray(_at(row, "text") if isinstance(row, Mapping) else row) for row in rows])
        tokens, labels = np.ascontiguousarray(text[:, :-1], np.int64), np.ascontiguousarray(text[:, 1:], np.int64)
    is_eod = tokens == eod if eod is not None else np.zeros_like(tokens, bool)
    loss_mask = np.array(given.get("loss_mask", np.ones(tokens.shape)), np.float32)
    if config.eod_mask_loss:
        loss_mask[is_eod] = 0.0
    positions = given.get("position_ids", np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
    if config.reset_position_ids and "position_ids" not in given:
        starts = np.zeros_like(tokens)
        starts[:, 1:] = np.where(is_eod[:, :-1], positions[:, 1:], 0)
        positions = positions - np.maximum.accumulate(starts, axis=1)
    documents = None
    if config.reset_attention_mask:
        ended = np.zeros_like(tokens)
        ended[:, 1:] = is_eod[:, :-1].cumsum(axis=1)
        documents = torch.from_numpy(ended)
    _check_length(config.seq_length, tokens)
    whole = (torch.from_numpy(array) for array in (tokens, labels, loss_mask, np.array(positions, np.int64)))
    return GPTBatch(*whole, documents)  # type: ignore[call-arg]


def _check_length(length: int | None, tokens: npt.NDArray[np.int64] | torch.Tensor) -> None:
    if length is not None and tokens.shape[1] != length:
        raise DataError("a sample", found=f"{tokens.shape[1]} tokens", expected=f"{length}, as --seq-length says")


def _at(row: Any, key: str) -> Any:
    """Raises: DataError for a row without that key"""
    try:
        return row[key]
    except (KeyError, IndexError, TypeError):
        names = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError("a sample", found=names, expected=f"a mapping with {key!r} in it") from None


_GIVEN = frozenset({"tokens", "labels", "loss_mask", "position_ids"})


def collate_bert(rows: Sequence[Mapping[str, Any]]) -> BERTBatch:
    """Megatron's samples to a batch."""
    text = _stack(rows, "text")
    b, s = text.shape
    return BERTBatch(
        text,
        _stack(rows, "types"),
        _stack(rows, "labels").clamp(min=0),
        _stack(rows, "loss_mask").float(),
        1 - _stack(rows, "padding_mask"),
        torch.tensor([int(_at(row, "is_random")) for row in rows]),
        torch.arange(s).repeat(b, 1),
        torch.ones(b),
    )


def collate_t5(rows: Sequence[Mapping[str, Any]]) -> T5Batch:
    """Megatron's samples to a batch."""
    return T5Batch(
        _stack(rows, "text_enc"),
        _stack(rows, "text_dec"),
        _stack(rows, "labels").clamp(min=0),
        _stack(rows, "loss_mask").float(),
        1 - _stack(rows, "enc_mask"),
    )


def _stack(rows: Sequence[Mapping[str, Any]], key: str) -> torch.Tensor:
    """[b, s], int64; a mask of s x s, as Megatron-DeepSpeed makes them, is known by its diagonal."""
    arrays = [np.asarray(_at(row, key)) for row in rows]
    arrays = [array.diagonal() if array.ndim == 2 else array for array in arrays]
    return torch.from_numpy(np.stack(arrays).astype(np.int64))
