"""Bytes that live because of a step, counted from the tensors that operations make."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_ds.pipeline.executor import Executor, Key
from megatron_ds.pipeline.schedule import Kind


class LiveBytes(TorchDispatchMode):
    """While it is on and has an owner, counts every new storage until it is freed or forgotten.

    Views of older tensors and writes into them make no storage, so that parameters, gradients, optimizer state and
    batches are not in it. It cannot tell fake tensors from real ones. What an operator allocates and frees inside is
    not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner: Hashable | None = None
        self.bytes = self.peak = 0
        self._made: dict[int, tuple[Hashable, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.owner is None:
            return func(*args, **(kwargs or {}))
        older = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in older and storage._cdata not in self._made:
                self._made[storage._cdata] = self.owner, storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return out

    def forget(self, owner: Hashable) -> None:
        """Count no longer what is left of this owner's."""
        for made in [made for made, (one, _) in self._made.items() if one == owner]:
            self._drop(made)

    def forget_tensor(self, tensor: torch.Tensor) -> None:
        """Count this one no longer."""
        self._drop(tensor.untyped_storage()._cdata)

    def _drop(self, made: int) -> None:
        _, size = self._made.pop(made, (None, 0))
        self.bytes -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


class Footprint(NamedTuple):
    """What is kept for backwards that have not run, before and after one action, and the most at once while it ran."""

    kind: Kind
    chunk: int
    before: int
    after: int
    most: int


@contextmanager
def footprints(executor: Executor) -> Iterator[list[Footprint]]:
    """Watch what runs inside, for a list with one entry per action; several times slower than without.

    Counted are the tensors made for a micro-batch until its backward is done, and what other stages sent for it. A
    gradient on its way to another stage is a message, and not counted.
    """
    found: list[Footprint] = []
    unwatched = executor.do
    with LiveBytes() as live:
        executor.do = {kind: partial(_watched, live, executor, found, kind, work) for kind, work in unwatched.items()}
        try:
            yield found
        finally:
            executor.do = unwatched


def _watched(
    live: LiveBytes, executor: Executor, found: list[Footprint], kind: Kind, work: Callable[[Key], None], key: Key
) -> None:
    received = _received(executor)
    before, live.owner, live.peak = live.bytes, key, live.bytes
    work(key)
    live.owner = None
    most = live.peak + received
    if kind is Kind.I and key in executor.grad:
        live.forget_tensor(executor.grad[key])
    if kind in (Kind.B, Kind.W):
        live.forget(key)
    found.append(Footprint(kind, key[0], before + received, live.bytes + _received(executor), most))


def _received(executor: Executor) -> int:
    """Bytes of what other stages have sent, or were asked for, and nobody has used up."""
    stores = executor.upstream, executor.downstream
    return sum(received.tensor.nbytes for store in stores for received in store.values())
