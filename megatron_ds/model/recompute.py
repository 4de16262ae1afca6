"""Activation recomputation: keep a function's inputs only, and run it again when its gradient is wanted.

What is random in it draws from streams that are functions of (sample, layer, site), so that the second run equals the
first bit by bit once the streams stand at the same sample.

Source: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, sec. 5
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        kept, ctx.kept = [None if x is None else ctx.part.restore(*x) for x in ctx.kept], None
        inputs = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip((*kept, *ctx.saved_tensors), ctx.needs_input_grad[3:], strict=True)
        ]
        ctx.runtime.streams.sample = ctx.sample
        with torch.enable_grad():
            out = ctx.function(*inputs)
        torch.autograd.backward(out, grad)
        return None, None, None, *(None if x is None else x.grad for x in inputs)


class _Part:
    """Which part of a kept input this rank keeps, and where."""

    def __init__(self, runtime: Runtime):
        self.tp = runtime.shards.tp
        self.cut = runtime.recompute.distribute_saved_activations and self.tp.size > 1
        self.on_host = runtime.recompute.checkpoint_in_cpu

    def keep(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Size, torch.device]:
        """What to hold on to."""
        part = x.detach()
        if self.cut:
            part = part.reshape(-1).chunk(self.tp.size)[self.tp.rank].clone()
        return (part.to("cpu") if self.on_host else part), x.shape, x.device

    def restore(self, part: torch.Tensor, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """The input again.

        Comm: all-gather over tp where the input was cut
        """
        part = part.to(device)
        return (all_gather(part, self.tp) if self.cut else part).view(shape)


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
