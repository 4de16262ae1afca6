"""Runs an action list: the one engine for every schedule, and for pp=1 too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from megatron_ds.kernels.products import Products
from megatron_ds.model.runtime import PostponedGrad, WeightGrads
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.p2p import Transfer, post
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.pipeline.schedule import COMMUNICATION, Action, Kind, peer, runs
from megatron_ds.timers import Timers

Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of the last stage's output: sums of losses, and over how many targets each; a number each, or [losses]."""
ForwardStep = Callable[[Any, nn.Module, "torch.Tensor | None"], "tuple[Any, Loss]"]
"""(batch, model, upstream activation or None) -> (output, loss function); a tensor where it is sent on."""
Key = tuple[int, int]
"""(chunk, micro-batch)"""

MAX_SENDS_IN_FLIGHT = 4
TIMER_NAMES = {
    Kind.F: "forward-compute",
    Kind.B: "backward-compute",
    Kind.I: "backward-input-compute",
    Kind.W: "backward-weight-compute",
    Kind.REDUCE: "grads-sync",
    Kind.SEND_F: "forward-send",
    Kind.RECV_F: "forward-recv",
    Kind.SEND_B: "backward-send",
    Kind.RECV_B: "backward-recv",
}
"""Megatron's; a run of messages bears all of its names."""


class Microbatch(NamedTuple):
    """A batch, and the global row number of its first sample (dropout draws by it)."""

    batch: Any
    row: int


class Wire(NamedTuple):
    """What travels between stages.

    Shapes: [s, b, h], the part of a rank
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Received(NamedTuple):
    """A tensor that is there once its handle was waited for."""

    tensor: torch.Tensor
    handle: Any


class Gradients(Protocol):
    """Where gradients go; see Note [From autograd gradient to optimizer shard]."""

    def arm(self, chunk: int, still_missing: Sequence[torch.Tensor] | None) -> None:
        """The next backward completes the chunk's gradients: all of them, or those that are still missing."""

    def accumulate(self, weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, products: Products) -> None:
        """A gradient that autograd did not bring: grad^T x."""

    def finish(self, chunk: int) -> None:
        """They are complete: what is not yet being summed over ranks has to be."""


class Executor:
    """One rank's engine. `run` gives the sums of losses and the numbers of targets that this rank saw."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        forward_step: ForwardStep,
        gradients: Gradients,
        *,
        pp: Axis,
        wire: Wire,
        streams: DropoutStreams,
        weight_grads: WeightGrads,
        num_losses: int = 1,
    ):
        self.chunks, self.forward_step, self.gradients = chunks, forward_step, gradients
        self.pp, self.wire, self.streams, self.weight_grads = pp, wire, streams, weight_grads
        self.num_losses = num_losses
        self.loss_scale = 1.0
        """What the backward starts with, instead of 1."""
        self.loss_weights: torch.Tensor | None = None
        """What each sum of losses counts beside the others, [losses]; without it as much."""
        self.idle_seconds = 0.0
        """Time spent waiting for other stages, since somebody last set it to 0 (on GPUs what the host waited)."""
        self.do = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._backward_input,
            Kind.W: self._backward_weight,
            Kind.REDUCE: self._reduce,
        }

    def run(self, actions: Sequence[Action], microbatches: Sequence[Microbatch], timers: Timers) -> torch.Tensor:
        """Execute one step's actions.

        Shapes: -> [2, losses] fp64: sums, numbers of targets; zero on all but the last stage
        """
        self.microbatches = microbatches
        self.upstream: dict[Key, Received] = {}
        self.downstream: dict[Key, Received] = {}
        self.output: dict[Key, torch.Tensor] = {}
        self.grad: dict[Key, torch.Tensor] = {}
        self.postponed: dict[Key, list[PostponedGrad]] = {}
        self.sent: list[tuple[Any, torch.Tensor]] = []
        self.total = torch.zeros(2, self.num_losses, dtype=torch.float64, device=self.wire.device)
        self.training = any(action.kind is Kind.REDUCE for action in actions)
        self.reduced_after = {(a.chunk, a.microbatch) for a in actions if a.kind is Kind.REDUCE}
        with torch.set_grad_enabled(self.training):
            for run in runs(actions):
                with timers("-".join(TIMER_NAMES[action.kind] for action in run), level=2):
                    if run[0].kind in COMMUNICATION:
                        self._communicate(run)
                    else:
                        self.do[run[0].kind]((run[0].chunk, run[0].microbatch))
        while self.sent:
            self._wait(self.sent.pop(0)[0])
        self.microbatches = ()
        return self.total

    def _forward(self, key: Key) -> None:
        chunk, number = key
        batch, self.streams.sample = self.microbatches[number]
        upstream = self._arrived(self.upstream, key, keep=self.training)
        output, loss = self.forward_step(batch, self.chunks[chunk], upstream)
        ends = self.pp.is_last and chunk == len(self.chunks) - 1
        if ends:
            sums, targets = loss(output)
            self.total += torch.stack((sums.detach().double(), targets.double())).view_as(self.total)
            weighted = sums if self.loss_weights is None else sums * self.loss_weights
            output = weighted.sum() * self.loss_scale
        if self.training or not ends:
            self.output[key] = output

    def _backward(self, key: Key) -> None:
        if key in self.reduced_after:
            self.gradients.arm(key[0], None)
        self._autograd(key)

    def _backward_input(self, key: Key) -> None:
        with self.weight_grads.postponed() as self.postponed[key]:
            self._autograd(key)

    def _autograd(self, key: Key) -> None:
        torch.autograd.backward(self.output.pop(key), self._arrived(self.downstream, key, keep=False))
        upstream = self.upstream.pop(key, None)
        if upstream is not None:
            assert upstream.tensor.grad is not None
            self.grad[key] = upstream.tensor.grad

    def _backward_weight(self, key: Key) -> None:
        postponed = self.postponed.pop(key)
        if key in self.reduced_after:
            self.gradients.arm(key[0], [weight for weight, *_ in postponed])
        while postponed:
            weight, operands, products = postponed.pop(0)
            with torch.no_grad():
                self.gradients.accumulate(weight, *operands(), products)

    def _reduce(self, key: Key) -> None:
        self.gradients.finish(key[0])

    def _communicate(self, run: Sequence[Action]) -> None:
        transfers = [self._transfer(action) for action in run]
        for action, transfer, handle in zip(run, transfers, post(transfers, self.pp), strict=True):
            if transfer.send:
                self.sent.append((handle, transfer.tensor))
                continue
            is_activation = action.kind is Kind.RECV_F
            store = self.upstream if is_activation else self.downstream
            tensor = transfer.tensor.requires_grad_(is_activation and self.training)
            store[action.chunk, action.microbatch] = Received(tensor, handle)
        # A tensor must outlive its send. The schedule is checked to run even if every send blocks, so that waiting for
        # old ones here is safe and bounds what they hold.
        while len(self.sent) > MAX_SENDS_IN_FLIGHT:
            self._wait(self.sent.pop(0)[0])

    def _transfer(self, action: Action) -> Transfer:
        key, other = (action.chunk, action.microbatch), peer(action, self.pp.rank, self.pp.size)
        if action.kind is Kind.SEND_F:
            output = self.output[key] if self.training else self.output.pop(key)
            return Transfer(True, output.detach().contiguous(), other)
        if action.kind is Kind.SEND_B:
            return Transfer(True, self.grad.pop(key).contiguous(), other)
        return Transfer(False, torch.empty(self.wire.shape, dtype=self.wire.dtype, device=self.wire.device), other)

    def _arrived(self, store: dict[Key, Received], key: Key, keep: bool) -> torch.Tensor | None:
        """What another stage sent for this action, waited for only now; None at an end of the pipeline."""
        received = store.get(key) if keep else store.pop(key, None)
        if received is None:
            return None
        self._wait(received.handle)
        return received.tensor

    def _wait(self, handle: Any) -> None:
        start = time.perf_counter()
        handle.wait()
        self.idle_seconds += time.perf_counter() - start
