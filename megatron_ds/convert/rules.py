"""Rules: how one of our tensors is made of theirs, and taken apart again. Both directions read the same table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_ds.errors import CheckpointError

T = torch.Tensor


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, the tensors over there that hold the same numbers, and the ways between them.

    of_theirs: theirs, in the order of their names -> ours. to_theirs: ours -> theirs; each undoes the other.
    """

    ours: str
    theirs: tuple[str, ...]
    of_theirs: Callable[[Sequence[T]], T]
    to_theirs: Callable[[T], Sequence[T]]


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), lambda found: found[0], lambda tensor: [tensor])


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix stored [in, out] over there."""
    return Rule(ours, (theirs,), lambda found: found[0].t(), lambda tensor: [tensor.t()])


def as_row(ours: str, theirs: str) -> Rule:
    """A vector stored [1, n] over there."""
    return Rule(ours, (theirs,), lambda found: found[0][0], lambda tensor: [tensor[None]])


def joined(ours: str, theirs: Sequence[str], sizes: Sequence[int]) -> Rule:
    """Several tensors over there, one below the other here; sizes: rows of each."""
    return Rule(ours, tuple(theirs), lambda found: torch.cat(list(found)), lambda tensor: tensor.split(list(sizes)))


def interleaved(ours: str, theirs: str, heads: int) -> Rule:
    """Fused projections: rows [heads, 3, d] over there, [3, heads, d] here."""

    def of_theirs(found: Sequence[T]) -> T:
        return _swapped(found[0], heads, 3)

    return Rule(ours, (theirs,), of_theirs, lambda tensor: [_swapped(tensor, 3, heads)])


def _swapped(tensor: T, outer: int, inner: int) -> T:
    """Rows [outer, inner, d] as [inner, outer, d]."""
    return tensor.reshape(outer, inner, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)


def repeated(ours: str, theirs: Sequence[str]) -> Rule:
    """One tensor of ours that is stored several times over there.

    Raises: CheckpointError from of_theirs if the copies differ
    """

    def of_theirs(found: Sequence[T]) -> T:
        if not all(torch.equal(found[0], other) for other in found[1:]):
            raise CheckpointError(
                ", ".join(theirs),
                "tensors that differ",
                f"one and the same: here they are one table, {ours}",
                "this model has no place here",
            )
        return found[0]

    return Rule(ours, tuple(theirs), of_theirs, lambda tensor: [tensor] * len(theirs))


def beside_zeros(ours: str, theirs: str, zeros: str) -> Rule:
    """A matrix, next to a row of the same width that is always added over there and must be 0.

    Raises: CheckpointError from of_theirs if it is not
    """

    def of_theirs(found: Sequence[T]) -> T:
        if found[1].any():
            raise CheckpointError(zeros, "numbers", "zeros: here is nothing to add", "this model has no place here")
        return found[0]

    return Rule(ours, (theirs, zeros), of_theirs, lambda tensor: [tensor, tensor.new_zeros(1, tensor.shape[1])])


def both(make: Callable[[str, str], Rule], ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """One rule for the weight and, with bias, one for the bias of a module."""
    return [make(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in (("weight", "bias") if bias else ("weight",))]


def all_joined(ours: str, theirs: Sequence[str], sizes: Sequence[int], bias: bool = True) -> list[Rule]:
    """Several modules over there that are one here."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [joined(f"{ours}.{kind}", [f"{name}.{kind}" for name in theirs], sizes) for kind in kinds]
