"""Activation recomputation: keep a function's inputs only, and run it again when its gradient is wanted.

What is random in it draws from streams that are functions of (sample, layer, site), so that the second run equals the
first bit by bit once the streams stand at the same sample.

Source: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, sec. 5
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.collectives import all_gather


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., torch.Tensor], runtime: Runtime, layers: int, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.function, ctx.runtime, ctx.sample = function, runtime, runtime.streams.sample
        part = _Part(runtime)
        ctx.part, ctx.kept = part, [None if x is None else part.keep(x) for x in inputs[:layers]]
        ctx.save_for_backward(*inputs[layers:])
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, ctx.kept = [None if x is None else ctx.part.restore(x) for x in ctx.kept], None
        inputs = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip((*kept, *ctx.saved_tensors), ctx.needs_input_grad[3:], strict=True)
        ]
        ctx.runtime.streams.sample = ctx.sample
        with torch.enable_grad():
            out = ctx.function(*inputs)
        torch.autograd.backward(out, grad)
        return None, None, None, *(None if x is None else x.grad for x in inputs)


class _Kept(NamedTuple):
    """A part of an input, how to make the input of it again, and when a copy on the host is complete."""

    part: torch.Tensor
    shape: torch.Size
    device: torch.device
    copied: torch.cuda.Event | None = None


class _Part:
    """Which part of a kept input this rank keeps, and where."""

    def __init__(self, runtime: Runtime):
        self.tp = runtime.shards.tp
        self.cut = runtime.recompute.distribute_saved_activations and self.tp.size > 1
        self.on_host = runtime.recompute.checkpoint_in_cpu

    def keep(self, x: torch.Tensor) -> _Kept:
        """What to hold on to."""
        part = x.detach()
        if self.cut:
            part = part.reshape(-1).chunk(self.tp.size)[self.tp.rank].clone()
        if self.on_host and part.is_cuda:
            host, copied = _to_host(part)
            return _Kept(host, x.shape, x.device, copied)
        return _Kept(part, x.shape, x.device)

    def restore(self, kept: _Kept) -> torch.Tensor:
        """The input again.

        Comm: all-gather over tp where the input was cut
        """
        if kept.copied is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.copied)
        part = kept.part.to(kept.device, non_blocking=True)
        return (all_gather(part, self.tp) if self.cut else part).view(kept.shape)


def _to_host(x: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """A copy in pinned memory, made beside what is computed next, and when it is complete."""
    computing, copying = torch.cuda.current_stream(x.device), _copying(x.device)
    copying.wait_stream(computing)
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    with torch.cuda.stream(copying):
        host.copy_(x, non_blocking=True)
    x.record_stream(copying)
    return host, copying.record_event()


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The one stream of copies from a device; torch has but 32, which others use too."""
    return torch.cuda.Stream(device)


def recomputed(
    function: Callable[..., torch.Tensor], runtime: Runtime, *inputs: torch.Tensor | None, streams: int = 0
) -> torch.Tensor:
    """function(*inputs), of which only the inputs are kept.

    streams: how many of the first inputs are residual streams of whole layers, alike on all ranks of tp: these are kept
    cut over tp or on the host if asked. A tensor that needs a gradient must be among the inputs.
    Comm: backward: that of the forward once more
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    out: torch.Tensor = _Recomputed.apply(function, runtime, streams, *inputs)
    return out
