"""What any of Megatron's formats comes down to: options, and for every parameter its tensor-parallel pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ds.convert.megatron_args import SavedArgs
from megatron_ds.convert.megatron_join import Order
from megatron_ds.convert.megatron_names import Place, flatten, place
from megatron_ds.errors import CheckpointError
from megatron_ds.model.config import ModelType

Pieces = dict[str, list[torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint of Megatron with its files open: nothing joined, no values read.

    pieces: global name -> one tensor per tensor-parallel rank. vocab_size: the true one, where the checkpoint knows it.
    """

    path: Path
    args: SavedArgs
    iteration: int
    pieces: Pieces
    qkv: Order
    kv: Order
    vocab_size: int | None


class Collector:
    """Pieces of one model, chunk after chunk in the order of its layers."""

    def __init__(self, model_type: ModelType):
        self.model_type = model_type
        self.pieces: Pieces = {}
        self._layers: dict[str, int] = {}

    def add(self, chunk: Sequence[tuple[Path, Mapping[str, object]]]) -> None:
        """Take the state of one chunk from all its tensor-parallel ranks; what an earlier chunk had is a tied copy.

        Raises: CheckpointError for a name that is not known, or that only some of the ranks have
        """
        by_rank = [_places(path, state, self.model_type) for path, state in chunk]
        for (path, _), found in zip(chunk, by_rank, strict=True):
            odd = sorted(at.after(0) for at in found.keys() ^ by_rank[0].keys())
            if odd:
                raise broken(path, f"parameters that only some ranks of its group have: {', '.join(odd[:5])}")
        for at in by_rank[0]:
            pieces = [found[at] for found in by_rank]
            self.pieces.setdefault(at.after(self._layers.get(at.prefix, 0)), pieces)
        for prefix in {at.prefix for at in by_rank[0] if at.layer is not None}:
            here = {at.layer for at in by_rank[0] if at.prefix == prefix and at.layer is not None}
            self._layers[prefix] = self._layers.get(prefix, 0) + max(here) + 1


def _places(path: Path, state: Mapping[str, object], model_type: ModelType) -> dict[Place, torch.Tensor]:
    found: dict[Place, torch.Tensor] = {}
    for name, tensor in flatten(state):
        try:
            at = place(name, model_type)
        except LookupError:
            fix = "load it with the --model-type it was trained as; this may also be a model that is not supported"
            raise CheckpointError(str(path), f"parameter {name}", f"those of Megatron's {model_type}", fix) from None
        if at is not None:
            found[at] = tensor
    return found


def broken(path: Path, found: str, expected: str = "a complete checkpoint of Megatron") -> CheckpointError:
    """Something is missing from a checkpoint or damaged in it."""
    return CheckpointError(str(path), found, expected, "copy the checkpoint again, with all of its files")
