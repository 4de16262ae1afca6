"""What goes between host and device in a step, without either waiting for the other.

A copy of pageable memory, or one that does not say non_blocking, holds the host up until the device has done all that
was asked of it before. So do `torch.tensor(..., device=...)` and `new_tensor`, which are such copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from megatron_ds.pipeline.executor import Microbatch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, on which later work may already be asked to use it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class OnItsWay:
    """A tensor's values on the host, once the device has come that far."""

    def __init__(self, tensor: torch.Tensor):
        self._values, self._arrival = tensor, None
        if tensor.is_cuda:
            self._values = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._arrival = torch.cuda.Event(blocking=True)
            self._arrival.record()

    def wait(self) -> torch.Tensor:
        """Wait for them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values


class Microbatches(Sequence[Microbatch]):
    """A rank's micro-batches of one step: each is copied to the device beside the computation of the one before it.

    uses: how often each is asked for (once per chunk); after that the device's copy is let go of.
    ahead: how many are copied before they are asked for.
    """

    def __init__(
        self, given: Sequence[Any], rows: Sequence[int], device: torch.device, *, uses: int = 1, ahead: int = 1
    ):
        self.given, self.rows, self.device, self.ahead = given, rows, device, ahead
        self._left = [uses] * len(given)
        self._copied: dict[int, tuple[Any, torch.cuda.Event | None]] = {}
        self._begun = 0
        self._stream = _copying(device) if device.type == "cuda" else None
        self._copy_until(ahead)

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, number: int) -> Microbatch:  # type: ignore[override]
        self._copy_until(number + 1 + self.ahead)
        batch, arrival = self._copied[number]
        if arrival is not None:
            _await(batch, arrival, torch.cuda.current_stream(self.device))
        self._left[number] -= 1
        if not self._left[number]:
            del self._copied[number]
        return Microbatch(batch, self.rows[number])

    def _copy_until(self, stop: int) -> None:
        """Start copying those before `stop`."""
        for number in range(self._begun, min(stop, len(self.given))):
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                batch = self.given[number].to(self.device)
            self._copied[number] = batch, None if self._stream is None else self._stream.record_event()
        self._begun = max(self._begun, stop)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The one stream of copies to a device: freed memory is used again on the stream that it was made on, only."""
    return torch.cuda.Stream(device)


def _await(batch: Any, arrival: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Let the stream wait for a batch, and the batch's memory for the stream before it serves another copy."""
    stream.wait_event(arrival)
    for tensor in vars(batch).values():
        if tensor is not None:
            tensor.record_stream(stream)
