"""Runs an action list: the one engine for every schedule, and for pp=1 too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.p2p import Transfer, exchange
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.pipeline.schedule import COMMUNICATION, Action, Kind, peer, runs
from megatron_ds.timers import Timers

Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of the last stage's output: the sum of the target tokens' losses, and how many target tokens there are."""
ForwardStep = Callable[[Any, nn.Module, "torch.Tensor | None"], "tuple[torch.Tensor, Loss]"]
"""(batch, model, upstream activation or None) -> (output, loss function)."""


MAX_SENDS_IN_FLIGHT = 4
TIMER_NAMES = {
    Kind.F: "forward-compute",
    Kind.B: "backward-compute",
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

    Shapes: [s, b, h]
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Gradients(Protocol):
    """Where gradients go; see Note [From autograd gradient to optimizer shard]."""

    def arm(self) -> None:
        """The next backward completes them."""

    def finish(self) -> None:
        """Wait until they are summed over ranks."""


class Executor:
    """One rank's engine. `run` gives the sum of losses and the number of target tokens that this rank saw."""

    def __init__(
        self,
        model: nn.Module,
        forward_step: ForwardStep,
        gradients: Gradients,
        *,
        pp: Axis,
        wire: Wire,
        streams: DropoutStreams,
        loss_scale: float,
    ):
        self.model, self.forward_step, self.gradients = model, forward_step, gradients
        self.pp, self.wire, self.streams, self.loss_scale = pp, wire, streams, loss_scale
        self.do = {Kind.F: self._forward, Kind.B: self._backward, Kind.REDUCE: self._reduce}

    def run(self, actions: Sequence[Action], microbatches: Sequence[Microbatch], timers: Timers) -> torch.Tensor:
        """Execute one step's actions.

        Shapes: -> [2] fp64: loss sum, target tokens; zero on all but the last stage
        """
        self.microbatches = microbatches
        self.upstream: dict[int, torch.Tensor] = {}
        self.output: dict[int, torch.Tensor] = {}
        self.grad: dict[int, torch.Tensor] = {}
        self.sent: list[tuple[Any, torch.Tensor]] = []
        self.total = torch.zeros(2, dtype=torch.float64, device=self.wire.device)
        self.training = any(action.kind is Kind.B for action in actions)
        completes = {a.microbatch for a in actions if a.kind is Kind.REDUCE}
        with torch.set_grad_enabled(self.training):
            for run in runs(actions):
                if run[0].kind is Kind.B and run[0].microbatch in completes:
                    self.gradients.arm()
                with timers("-".join(TIMER_NAMES[action.kind] for action in run), level=2):
                    if run[0].kind in COMMUNICATION:
                        self._communicate(run)
                    else:
                        self.do[run[0].kind](run[0].microbatch)
        for work, _ in self.sent:
            work.wait()
        return self.total

    def _forward(self, i: int) -> None:
        batch, self.streams.sample = self.microbatches[i]
        upstream = self.upstream.get(i) if self.training else self.upstream.pop(i, None)
        output, loss = self.forward_step(batch, self.model, upstream)
        if self.pp.is_last:
            loss_sum, num_targets = loss(output)
            self.total += torch.stack((loss_sum.detach().double(), num_targets.double()))
            output = loss_sum * self.loss_scale
        if self.training or not self.pp.is_last:
            self.output[i] = output

    def _backward(self, i: int) -> None:
        torch.autograd.backward(self.output.pop(i), self.grad.pop(i, None))
        upstream = self.upstream.pop(i, None)
        if upstream is not None:
            assert upstream.grad is not None
            self.grad[i] = upstream.grad

    def _reduce(self, _: int) -> None:
        self.gradients.finish()

    def _communicate(self, run: Sequence[Action]) -> None:
        transfers = [self._transfer(action) for action in run]
        handles = exchange(transfers, self.pp)
        # A tensor must outlive its send. The schedule is checked to run even if every send blocks, so that waiting for
        # old ones here is safe and bounds what they hold.
        self.sent += zip(handles, [t.tensor for t in transfers if t.send], strict=False)
        while len(self.sent) > MAX_SENDS_IN_FLIGHT:
            self.sent.pop(0)[0].wait()

    def _transfer(self, action: Action) -> Transfer:
        i, other = action.microbatch, peer(action, self.pp.rank)
        if action.kind is Kind.SEND_F:
            output = self.output[i] if self.training else self.output.pop(i)
            return Transfer(True, output.detach().contiguous(), other)
        if action.kind is Kind.SEND_B:
            return Transfer(True, self.grad.pop(i).contiguous(), other)
        received = torch.empty(self.wire.shape, dtype=self.wire.dtype, device=self.wire.device)
        store = self.upstream if action.kind is Kind.RECV_F else self.grad
        store[i] = received.requires_grad_(action.kind is Kind.RECV_F and self.training)
        return Transfer(False, received.detach(), other)
