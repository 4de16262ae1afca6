"""Checks a schedule before any rank runs it, and tells what a step costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, product
from typing import NamedTuple

from megatron_ds.pipeline.schedule import (
    COMMUNICATION,
    Action,
    Actions,
    Kind,
    ScheduleError,
    Span,
    answer,
    messages,
    peer,
    runs,
    timeline,
)


@dataclass(frozen=True)
class Report:
    """What a simulated step costs, stage by stage.

    idle: share of the makespan in which a stage computes nothing.
    peak_live: most micro-batches, summed over the stage's chunks, whose F ran and whose B or W did not yet.
    peak_waiting: most messages whose receive was posted and that were not used yet.
    """

    makespan: float
    idle: tuple[float, ...]
    peak_live: tuple[int, ...]
    peak_waiting: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def bubble(self) -> float:
        """Time lost over the busiest stage's own work: (p - 1) / m for 1F1B and GPipe."""
        return 1 / (1 - min(self.idle)) - 1


def check(
    all_stages: Sequence[Sequence[Action]],
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    weight_time: float | None = None,
    backward: bool = True,
) -> Report:
    """Simulate all stages and tell what the step costs; `backward=False` for an evaluation pass.

    Times are those of a micro-batch on all chunks of a stage together. Of a split backward W takes `weight_time`, by
    default half of it, and I the rest.

    Raises: ScheduleError for a missing, doubled or misplaced action, messages that do not pair up, a deadlock
    """
    size = _size(all_stages, backward)
    for stage, actions in enumerate(all_stages):
        _check_stage(actions, stage, size)
    _meet(all_stages)
    weight_time = backward_time / 2 if weight_time is None else weight_time
    times = {Kind.F: forward_time, Kind.B: backward_time, Kind.I: backward_time - weight_time, Kind.W: weight_time}
    spans = timeline(all_stages, size.chunks, {kind: time / size.chunks for kind, time in times.items()})
    makespan = max(stage_spans[-1].end for stage_spans in spans)
    busy = (sum(span.end - span.start for span in stage_spans) for stage_spans in spans)
    return Report(
        makespan=makespan,
        idle=tuple(1 - b / makespan for b in busy),
        peak_live=tuple(_peak_live(actions) if backward else 0 for actions in all_stages),
        peak_waiting=tuple(_peak_waiting(actions, stage, size) for stage, actions in enumerate(all_stages)),
        spans=tuple(map(tuple, spans)),
    )


class _Size(NamedTuple):
    """What the actions of all stages together say of the step; `passes` are the kinds of work on a micro-batch."""

    stages: int
    chunks: int
    microbatches: int
    passes: tuple[Kind, ...]


def _size(all_stages: Sequence[Sequence[Action]], backward: bool) -> _Size:
    found = {action for actions in all_stages for action in actions}
    split = not {action.kind for action in found}.isdisjoint((Kind.I, Kind.W))
    return _Size(
        stages=len(all_stages),
        chunks=1 + max((action.chunk for action in found), default=0),
        microbatches=1 + max((action.microbatch for action in found), default=-1),
        passes=(Kind.F, *((Kind.I, Kind.W) if split else (Kind.B,))) if backward else (Kind.F,),
    )


def _chains(stage: int, size: _Size) -> Iterator[Actions]:
    """What must happen to each micro-batch on each chunk of a stage, one after the other."""
    for chunk, microbatch in product(range(size.chunks), range(size.microbatches)):
        steps: list[Action | None] = []
        for kind in size.passes:
            action = Action(kind, chunk, microbatch)
            receive, send = messages(action, stage, size.stages, size.chunks)
            steps += [receive, action, send]
        yield tuple(action for action in steps if action)


def _check_stage(actions: Sequence[Action], stage: int, size: _Size) -> None:
    """Every micro-batch of every chunk once, messages where the model goes on, each in a possible place."""
    chains = list(_chains(stage, size))
    found = Counter(a for a in actions if a.kind is not Kind.REDUCE)
    for action in chain.from_iterable(chains):
        if found.pop(action, 0) != 1:
            count = sum(a == action for a in actions)
            raise ScheduleError(f"stage {stage}: {action} occurs {count} times, expected once")
    if found:
        raise ScheduleError(f"stage {stage}: {min(found)} has no place there")
    position = {action: at for at, action in enumerate(actions)}
    for before, after in chain.from_iterable(map(pairwise, chains)):
        first, second = position[before], position[after]
        if first > second:
            raise ScheduleError(f"stage {stage}: {after} stands before {before}")
        if after.kind in (Kind.SEND_F, Kind.SEND_B) and any(
            a.kind not in COMMUNICATION for a in actions[first + 1 : second]
        ):
            raise ScheduleError(f"stage {stage}: {after} does not stand right behind {before}")
    for chunk in range(size.chunks if len(size.passes) > 1 else 0):
        _check_reduce(actions, stage, chunk)


def _check_reduce(actions: Sequence[Action], stage: int, chunk: int) -> None:
    """Once after the chunk's last backward, or right after every one of them."""
    backwards = [a for a in actions if a.kind in (Kind.B, Kind.W) and a.chunk == chunk]
    reductions = [a for a in actions if a.kind is Kind.REDUCE and a.chunk == chunk]
    for wanted in (backwards[-1:], backwards):
        if [a.microbatch for a in reductions] == [a.microbatch for a in wanted]:
            break
    else:
        times = f"{len(reductions)} times" if len(reductions) != 1 else f"for micro-batch {reductions[0].microbatch}"
        raise ScheduleError(f"stage {stage}: chunk {chunk} is reduced {times}, expected once, for {backwards[-1]}")
    position = {action: at for at, action in enumerate(actions)}
    for backward, reduction in zip(wanted, reductions, strict=True):
        if position[reduction] < position[backward]:
            raise ScheduleError(f"stage {stage}: {reduction} stands before {backward}")


def _peak_live(actions: Sequence[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += (action.kind is Kind.F) - (action.kind in (Kind.B, Kind.W))
        peak = max(peak, live)
    return peak


def _peak_waiting(actions: Sequence[Action], stage: int, size: _Size) -> int:
    waiting = peak = 0
    for action in actions:
        receive, _ = messages(action, stage, size.stages, size.chunks)
        waiting += (action.kind in (Kind.RECV_F, Kind.RECV_B)) - (receive is not None)
        peak = max(peak, waiting)
    return peak


@dataclass
class _Channel:
    """What one stage has posted for another so far, both as the receiver calls it."""

    sends: list[Action] = field(default_factory=list)
    receives: list[Action] = field(default_factory=list)


def _meet(all_stages: Sequence[Sequence[Action]]) -> None:
    """Let every stage wait in every run until all of it is posted at the other end as well: the hardest case.

    Raises: ScheduleError for a message that meets another one's receive, and if all stages wait
    """
    steps = [list(runs(actions)) for actions in all_stages]
    at = [0] * len(steps)
    posted: list[list[tuple[_Channel, int]] | None] = [None] * len(steps)
    channels = {(a, b): _Channel() for a in range(len(steps)) for b in range(len(steps))}
    moved = True
    while moved:
        moved = False
        for stage, todo in enumerate(steps):
            while at[stage] < len(todo):
                mine = posted[stage] or _post(todo[at[stage]], stage, len(steps), channels)
                if any(number >= min(len(channel.sends), len(channel.receives)) for channel, number in mine):
                    posted[stage] = mine
                    break
                posted[stage] = None
                at[stage], moved = at[stage] + 1, True
    waiting = [f"stage {s} waits in [{_words(steps[s][at[s]])}]" for s in range(len(steps)) if at[s] < len(steps[s])]
    if waiting:
        raise ScheduleError("deadlock: " + ", ".join(waiting))


def _post(
    step: Actions, stage: int, num_stages: int, channels: dict[tuple[int, int], _Channel]
) -> list[tuple[_Channel, int]]:
    """Post a run; for each of its messages the channel and its number there. The n-th send meets the n-th receive."""
    posted = []
    for action in step if step[0].kind in COMMUNICATION else ():
        other = peer(action, stage, num_stages)
        sending = action.kind in (Kind.SEND_F, Kind.SEND_B)
        source, target = (stage, other) if sending else (other, stage)
        channel = channels[source, target]
        mine, theirs = (channel.sends, channel.receives) if sending else (channel.receives, channel.sends)
        number = len(mine)
        mine.append(answer(action, stage, num_stages) if sending else action)
        if number < len(theirs) and mine[number] != theirs[number]:
            sent, received = channel.sends[number], channel.receives[number]
            raise ScheduleError(f"stage {source} sends what stage {target} calls {sent}, but there {received} meets it")
        posted.append((channel, number))
    return posted


def _words(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))
