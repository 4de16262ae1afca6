"""Bytes that live because of a step, counted from the tensors that operations make."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_ds.pipeline.executor import Executor, Key
from megatron_ds.pipeline.schedule import Kind


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made while `counts` is set, until they are freed or forgotten.

    Views of older tensors and writes into them make no storage, so that parameters, gradients, optimizer state and
    batches are not in it. It cannot tell fake tensors from real ones. What an operator takes and gives back inside is
    not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = False
        self.bytes = self.peak = 0
        self._made: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.counts:
            return func(*args, **(kwargs or {}))
        older = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in older and storage._cdata not in self._made:
                self._made[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
        self.peak = max(self.peak, self.bytes)
        return out

    def forget(self, storage: torch.UntypedStorage | None) -> None:
        """Count this one no longer."""
        if storage is not None:
            self._drop(storage._cdata)

    def _drop(self, made: int) -> None:
        self.bytes -= self._made.pop(made, 0)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


class Footprint(NamedTuple):
    """Bytes of activations before and after one action, and the most at once while it ran."""

    kind: Kind
    chunk: int
    before: int
    after: int
    most: int


@contextmanager
def footprints(executor: Executor) -> Iterator[list[Footprint]]:
    """Watch what runs inside, for a list with one entry per action; several times slower than without.

    Activations are what actions make and leave behind, and what other stages have sent and was not used up yet.
    Messages to other stages do not count once the backward is through, however long they are on their way.
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
    received, before = _received(executor), live.bytes
    sent = weakref.ref(executor.output[key].untyped_storage()) if kind in (Kind.B, Kind.I) else None
    live.counts, live.peak = True, before
    work(key)
    live.counts = False
    if sent:
        live.forget(sent())
        live.forget(executor.grad[key].untyped_storage() if key in executor.grad else None)
    found.append(Footprint(kind, key[0], before + received, live.bytes + _received(executor), live.peak + received))


def _received(executor: Executor) -> int:
    """Bytes of what other stages have sent, or will, and nobody has used up."""
    stores = executor.upstream, executor.downstream
    return sum(received.tensor.nbytes for store in stores for received in store.values())
