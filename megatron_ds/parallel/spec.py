"""Sharding as arithmetic: which elements of a global parameter lie where in a local tensor.

Words. A *box* is a rectangle of a global tensor (start and shape per dim). A *region* pairs a box of the local tensor
with the box of the global tensor that it holds. A *piece* is a region with the values in it. Model, optimizer and
checkpoint speak of parameters in these words only, so that any layout can load what any other layout saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch


class Box(NamedTuple):
    """A rectangle of a tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def intersect(self, other: Box) -> Box | None:
        """The common rectangle, or None."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )
        shape = tuple(e - s for s, e in zip(start, stop, strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def slices(self, origin: tuple[int, ...] | None = None) -> tuple[slice, ...]:
        """Index expression for this box in a tensor whose first element lies at `origin`."""
        origin = origin or (0,) * len(self.start)
        return tuple(slice(s - o, s - o + n) for s, o, n in zip(self.start, origin, self.shape, strict=True))


class Region(NamedTuple):
    """The same elements seen from the local tensor and from the global one; both boxes have one shape."""

    local: Box
    globe: Box


class Piece(NamedTuple):
    """Values of one box of a named global tensor; `tensor` is a view, so writing to it loads the parameter."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor


@dataclass(frozen=True)
class Init:
    """Initial values: normal(0, std), or a constant."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@dataclass(frozen=True)
class Split:
    """How a parameter is cut over the tensor-parallel axis.

    parts: sizes of what is fused along `dim` (query, key, value; gate, up); each is cut by itself. Empty: one part.
    padded_to: the extent that is cut when `dim` is padded first (the vocabulary); rows past the end exist only locally.
    """

    dim: int
    parts: tuple[int, ...] = ()
    padded_to: int | None = None


@dataclass(frozen=True)
class ParamSpec:
    """One row of the parameter table: everything that anyone may ask about a parameter except its values.

    shape: the global shape, without padding. partial_over: axes over which a rank's gradient is only a partial sum.
    owned_by_first_stage: a tied copy on a later pipeline stage; its owner saves it and counts it.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    split: Split | None = None
    decay: bool = True
    partial_over: tuple[str, ...] = ()
    owned_by_first_stage: bool = False

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of the local tensor, padding included."""
        if self.split is None:
            return self.shape
        extent = self.split.padded_to or self.shape[self.split.dim]
        assert extent % tp_size == 0, f"{self.name}: {extent} over {tp_size} ranks"
        return _replace(self.shape, self.split.dim, extent // tp_size)

    def regions(self, tp_rank: int, tp_size: int) -> list[Region]:
        """What of the global tensor the given rank holds, part by part; padding belongs to no region."""
        zeros = (0,) * len(self.shape)
        if self.split is None:
            return [Region(Box(zeros, self.shape), Box(zeros, self.shape))]
        dim, out = self.split.dim, []
        local_start = global_start = 0
        for size in self.split.parts or (self.split.padded_to or self.shape[dim],):
            share = size // tp_size
            start = global_start + tp_rank * share
            count = min(share, self.shape[dim] - start)
            if count > 0:
                shape = _replace(self.shape, dim, count)
                out.append(
                    Region(Box(_replace(zeros, dim, local_start), shape), Box(_replace(zeros, dim, start), shape))
                )
            local_start += share
            global_start += size
        return out

    def pieces(self, local: torch.Tensor, tp_rank: int, tp_size: int, name: str | None = None) -> list[Piece]:
        """The pieces of a whole local tensor."""
        return [
            Piece(name or self.name, self.shape, region.globe, local[region.local.slices()])
            for region in self.regions(tp_rank, tp_size)
        ]

    def flat_pieces(
        self, flat: torch.Tensor, start: int, tp_rank: int, tp_size: int, name: str | None = None
    ) -> list[Piece]:
        """The pieces of elements [start, start + len(flat)) of the flattened local tensor (a ZeRO shard)."""
        out, used = [], 0
        for box in flat_boxes(self.local_shape(tp_size), start, start + flat.numel()):
            values = flat[used : used + math.prod(box.shape)].view(box.shape)
            used += values.numel()
            for region in self.regions(tp_rank, tp_size):
                common = box.intersect(region.local)
                if common:
                    shift = tuple(g - n for g, n in zip(region.globe.start, region.local.start, strict=True))
                    where = Box(tuple(s + d for s, d in zip(common.start, shift, strict=True)), common.shape)
                    out.append(Piece(name or self.name, self.shape, where, values[common.slices(box.start)]))
        return out


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut the flat range [start, stop) of a row-major tensor into boxes, in order: for a matrix at most three."""
    if stop <= start:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else ()
    if last > first:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _in_row(shape, last, 0, stop - last * row) if stop > last * row else ()


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in flat_boxes(shape[1:], start, stop):
        yield Box((row, *box.start), (1, *box.shape))


def _replace(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return values[:index] + (value,) + values[index + 1 :]
