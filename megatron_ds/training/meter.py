"""--report-costs: a run's own steps measured, beside what was predicted of them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import torch

from megatron_ds.parallel.collectives import gather_bytes
from megatron_ds.pipeline.executor import Key
from megatron_ds.pipeline.schedule import Kind
from megatron_ds.pipeline.simulate import check
from megatron_ds.training.costs import Costs, Held, held, most_live, predict, sent_so_far
from megatron_ds.training.engine import Engine
from megatron_ds.training.memory import footprints
from megatron_ds.training.progress import Progress
from megatron_ds.training.run import Recipe


class Account(NamedTuple):
    """What one rank has to say.

    waited_s, reduced_s: of its timed steps together, time spent waiting for other stages, and time until its gradients
    were reduced; 0 where nothing was timed. allocated_bytes: on GPUs, the most that torch's allocator had given out.
    """

    stage: int
    predicted: Costs
    measured: Costs
    waited_s: float
    reduced_s: float
    allocated_bytes: int

    def encode(self) -> bytes:
        """For the way to the other ranks."""
        return json.dumps(self._replace(predicted=vars(self.predicted), measured=vars(self.measured))).encode()  # type: ignore[arg-type]

    @classmethod
    def decode(cls, raw: bytes) -> Account:
        """Read back."""
        stage, predicted, measured, *others = json.loads(raw)
        return cls(stage, _costs(predicted), _costs(measured), *others)


def _costs(fields: Mapping[str, Any]) -> Costs:
    return Costs(**{**fields, "held": Held(*fields["held"]), "sent": Counter(fields["sent"])})


class Meter:
    """Measures a rank's steps: bytes in the first one of the most micro-batches, times in the others."""

    def __init__(self, engine: Engine):
        self.engine, do = engine, engine.executor.do
        self.costs: Costs | None = None
        self.allocated_bytes = 0
        self.waited_s = self.reduced_s = self.reduced_at = 0.0
        do[Kind.REDUCE] = partial(self._reduce, do[Kind.REDUCE])

    @contextmanager
    def step(self, progress: Progress) -> Iterator[None]:
        """Around a training step that starts from there."""
        num_microbatches = self.engine.run.plan.num_microbatches_at(progress.consumed_samples)
        if self.costs is None or num_microbatches > self.costs.num_microbatches:
            with self._weighed(num_microbatches):
                yield
        else:
            with self._timed():
                yield

    @contextmanager
    def _weighed(self, num_microbatches: int) -> Iterator[None]:
        """Count bytes, which makes the step slow."""
        parallel, on_gpu = self.engine.run.parallel, self.engine.run.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = sent_so_far(parallel)
        with footprints(self.engine.executor) as found:
            yield
        self.costs = Costs(
            num_microbatches,
            held(self.engine),
            sent_so_far(parallel) - before,
            activation_bytes=max(action.after for action in found),
            peak_bytes=max(action.most for action in found),
            live=most_live([action.kind for action in found]) / len(self.engine.chunks),
        )
        self.allocated_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        executor, begun = self.engine.executor, time.perf_counter()
        executor.idle_seconds = 0.0
        yield
        if self.engine.run.device.type == "cpu":  # a GPU waits where its host does not see it
            self.waited_s += executor.idle_seconds
            self.reduced_s += self.reduced_at - begun

    def _reduce(self, work: Callable[[Key], None], key: Key) -> None:
        work(key)
        self.reduced_at = time.perf_counter()

    def report(self, recipe: Recipe) -> str:
        """A table per stage, the same on every rank.

        Comm: gathers every rank's costs over the world
        """
        run = self.engine.run
        if self.costs is None:
            return "costs: no step was measured"
        count, rank = self.costs.num_microbatches, run.parallel.world.rank
        predicted = predict(run, recipe, rank, count)
        own = Account(run.parallel.pp.rank, predicted, self.costs, self.waited_s, self.reduced_s, self.allocated_bytes)
        accounts = [Account.decode(raw) for raw in gather_bytes(own.encode(), run.parallel.world)]
        return page(accounts, check(run.plan.actions(count)).idle)


def page(accounts: Sequence[Account], planned_idle: Sequence[float]) -> str:
    """A table per stage: what all ranks say, in order, and the idle share of each stage by the schedule."""
    stages: dict[int, list[int]] = {}
    for rank, account in enumerate(accounts):
        stages.setdefault(account.stage, []).append(rank)
    found_idle = idle_shares([account.waited_s for account in accounts], [account.reduced_s for account in accounts])
    title = f"costs of a step of {accounts[0].measured.num_microbatches} micro-batches, per rank"
    lines = [f"{title:<52}{'predicted':>18}{'measured':>18}"]
    for stage, ranks in sorted(stages.items()):
        first = accounts[ranks[0]]
        lines.append(f"stage {stage}, " + (f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"))
        rows = _rows(first)
        if first.allocated_bytes:
            rows["GPU memory allocated (bytes)"] = "", f"{first.allocated_bytes:,}"
        idle = [found_idle[rank] for rank in ranks] if found_idle else []
        rows["idle"] = f"{planned_idle[stage]:.1%}", f"{mean(idle):.1%}" if idle else "not measured"
        lines += [f"  {name:<50}{predicted:>18}{measured:>18}" for name, (predicted, measured) in rows.items()]
        others = [rank for rank in ranks if _rows(accounts[rank]) != _rows(first)]
        lines += [f"  other bytes on ranks {', '.join(map(str, others))}"] if others else []
    return "\n".join(lines)


def idle_shares(waited_s: Sequence[float], reduced_s: Sequence[float]) -> list[float]:
    """Each rank's share of time without work, until the last rank's gradients were reduced; empty if nobody knows.

    A rank that is done early waits for the others outside of its executor, where the step's sums are made.
    """
    last = max(reduced_s)
    return [(waited + last - reduced) / last for waited, reduced in zip(waited_s, reduced_s, strict=True) if last]


def _rows(account: Account) -> dict[str, tuple[str, str]]:
    """Names of all that is counted, each with both values."""
    sides = account.predicted, account.measured
    names = ["parameters", "parameters (bytes)", "gradients (bytes)", "optimizer state (bytes)"]
    values = dict(zip(names, zip(*(side.held for side in sides), strict=True), strict=True))
    values["activations kept at most (bytes)"] = sides[0].activation_bytes, sides[1].activation_bytes
    values["the same with what one action needs (bytes)"] = sides[0].peak_bytes, sides[1].peak_bytes
    for name in sorted(sides[0].sent.keys() | sides[1].sent.keys()):
        values[f"sent: {name} (bytes)"] = sides[0].sent[name], sides[1].sent[name]
    rows = {name: (f"{predicted:,}", f"{measured:,}") for name, (predicted, measured) in values.items()}
    return {**rows, "micro-batches kept at most": (f"{sides[0].live:g}", f"{sides[1].live:g}")}
