"""Pipeline schedules as lists of actions, and a simulator that checks them before any rank runs.

A schedule says, stage by stage, what to do in which order. It is data: nothing here knows torch or a device.

    order    what a stage computes:          F0 F1 B0 F2 B1 ... R
    actions  the same with its messages:     rF0 F0 sF0 rF1 F1 [sF1 rB0] B0 [sB0 rF2] F2 ... R
    run      neighbouring messages in [ ]:   posted together, waited for together

Posting a whole run at once is what keeps neighbours from waiting for each other: in the steady state of 1F1B a stage's
[sF rB] meets the next stage's [sB rF], so both directions move at the same time.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Literal, NamedTuple


class Kind(str, Enum):
    """What an action does; the value is how it is printed."""

    F = "F"
    B = "B"
    SEND_F = "sF"
    RECV_F = "rF"
    SEND_B = "sB"
    RECV_B = "rB"
    REDUCE = "R"


COMMUNICATION = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
_SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
_OTHER_END = {Kind.SEND_F: Kind.RECV_F, Kind.RECV_F: Kind.SEND_F, Kind.SEND_B: Kind.RECV_B, Kind.RECV_B: Kind.SEND_B}


class Action(NamedTuple):
    """One thing that a stage does. A REDUCE bears the micro-batch whose backward completed the chunk's gradients."""

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        number = "" if self.kind is Kind.REDUCE else str(self.microbatch)
        return f"{self.kind.value}{number}" + (f".{self.chunk}" if self.chunk else "")


Actions = tuple[Action, ...]
ScheduleName = Literal["1f1b", "gpipe", "forward"]


class ScheduleError(Exception):
    """A schedule that would hang or compute something else: a bug of ours, never a user's."""


def gpipe(stage: int, num_stages: int, num_microbatches: int) -> Actions:
    """All forwards, then all backwards: every micro-batch is live at the turn.

    Source: Huang et al. 2019, arXiv:1811.06965
    """
    forwards = forward_only(stage, num_stages, num_microbatches)
    return forwards + tuple(_action(Kind.B, i) for i in range(num_microbatches)) + _reduce(num_microbatches)


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> Actions:
    """A backward as soon as one can run: stage s keeps at most `num_stages - s` micro-batches live.

    Source: Narayanan et al. 2021, arXiv:2104.04473, sec. 2.2 (the non-interleaved schedule)
    """
    warmup = min(num_stages - stage - 1, num_microbatches)
    order = [_action(Kind.F, i) for i in range(warmup)]
    for i in range(num_microbatches - warmup):
        order += [_action(Kind.F, warmup + i), _action(Kind.B, i)]
    order += [_action(Kind.B, i) for i in range(num_microbatches - warmup, num_microbatches)]
    return tuple(order) + _reduce(num_microbatches)


def forward_only(stage: int, num_stages: int, num_microbatches: int) -> Actions:
    """Forwards without backwards, for evaluation; the same order on every stage."""
    return tuple(_action(Kind.F, i) for i in range(num_microbatches))


_ORDERS: dict[ScheduleName, Callable[[int, int, int], Actions]] = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
    "forward": forward_only,
}


def _action(kind: Kind, microbatch: int) -> Action:
    return Action(kind, 0, microbatch)


def _reduce(num_microbatches: int) -> Actions:
    return (_action(Kind.REDUCE, num_microbatches - 1),)


def with_communication(order: Iterable[Action], stage: int, num_stages: int) -> Actions:
    """The order with receives right before, and sends right after, the F or B that they belong to."""
    first, last = stage == 0, stage == num_stages - 1
    out: list[Action] = []
    for action in order:
        if action.kind is Kind.F:
            receive, send, has_source, has_target = Kind.RECV_F, Kind.SEND_F, not first, not last
        elif action.kind is Kind.B:
            receive, send, has_source, has_target = Kind.RECV_B, Kind.SEND_B, not last, not first
        else:
            out.append(action)
            continue
        out += [action._replace(kind=receive)] if has_source else []
        out.append(action)
        out += [action._replace(kind=send)] if has_target else []
    return tuple(out)


def build(schedule_name: ScheduleName, num_stages: int, num_microbatches: int) -> tuple[Actions, ...]:
    """The actions of every stage, messages included."""
    order = _ORDERS[schedule_name]
    return tuple(
        with_communication(order(stage, num_stages, num_microbatches), stage, num_stages) for stage in range(num_stages)
    )


def runs(actions: Iterable[Action]) -> Iterator[Actions]:
    """Cut actions into steps: neighbouring messages together, anything else by itself."""
    pending: list[Action] = []
    for action in actions:
        if action.kind in COMMUNICATION:
            pending.append(action)
            continue
        if pending:
            yield tuple(pending)
            pending = []
        yield (action,)
    if pending:
        yield tuple(pending)


def peer(action: Action, stage: int) -> int:
    """The stage at the other end of a message."""
    return stage + 1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else stage - 1


class Span(NamedTuple):
    """When a stage computed an action."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Report:
    """What a simulated step costs.

    idle: share of the makespan in which a stage computes nothing.
    peak_live: most micro-batches whose F ran and whose B did not yet.
    """

    makespan: float
    idle: tuple[float, ...]
    peak_live: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def bubble(self) -> float:
        """Time lost over the busiest stage's own work: (p - 1) / m for 1F1B and GPipe."""
        return 1 / (1 - min(self.idle)) - 1


def check(
    all_stages: Sequence[Sequence[Action]],
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    backward: bool = True,
) -> Report:
    """Simulate all stages and tell what the step costs; `backward=False` for an evaluation pass.

    Raises: ScheduleError for a missing, doubled or misplaced action, messages that do not pair up, a deadlock
    """
    microbatches = 1 + max((a.microbatch for actions in all_stages for a in actions), default=-1)
    for stage, actions in enumerate(all_stages):
        _check_stage(actions, stage, len(all_stages), microbatches, backward)
    # A message library may or may not buffer a send. Without buffers is the hard case for deadlocks, with buffers the
    # right one for times, since no stage computes later because nobody has collected its message yet.
    _Simulation(all_stages, forward_time, backward_time, buffered=False).run()
    spans = _Simulation(all_stages, forward_time, backward_time, buffered=True).run()
    makespan = max(stage_spans[-1].end for stage_spans in spans)
    busy = (sum(span.end - span.start for span in stage_spans) for stage_spans in spans)
    return Report(makespan, tuple(1 - b / makespan for b in busy), tuple(map(_peak_live, all_stages)), spans)


def _check_stage(actions: Sequence[Action], stage: int, num_stages: int, microbatches: int, backward: bool) -> None:
    """Every micro-batch of every chunk once, messages where the stage has a neighbour, each in a possible order."""
    chunks = 1 + max((a.chunk for a in actions), default=0)
    expected: list[Action] = []
    for chunk in range(chunks):
        for i in range(microbatches):
            one = [Action(Kind.F, chunk, i)] + ([Action(Kind.B, chunk, i)] if backward else [])
            expected += with_communication(one, stage, num_stages)
    found = Counter(a for a in actions if a.kind is not Kind.REDUCE)
    for action in expected:
        if found[action] != 1:
            raise ScheduleError(f"stage {stage}: {action} occurs {found[action]} times, expected once")
    extra = set(found) - set(expected)
    if extra:
        raise ScheduleError(f"stage {stage}: {min(extra)} has no place there")
    position = {action: at for at, action in enumerate(actions)}
    for before, after in pairwise(expected):
        if (before.chunk, before.microbatch) == (after.chunk, after.microbatch) and position[before] > position[after]:
            raise ScheduleError(f"stage {stage}: {after} stands before {before}")
    for chunk in range(chunks if backward else 0):
        _check_reduce(actions, stage, chunk)


def _check_reduce(actions: Sequence[Action], stage: int, chunk: int) -> None:
    at = [i for i, a in enumerate(actions) if a.kind is Kind.REDUCE and a.chunk == chunk]
    if len(at) != 1:
        raise ScheduleError(f"stage {stage}: chunk {chunk} is reduced {len(at)} times, expected once")
    last = max(i for i, a in enumerate(actions) if a.kind is Kind.B and a.chunk == chunk)
    if at[0] < last:
        raise ScheduleError(f"stage {stage}: {actions[at[0]]} stands before {actions[last]}")
    if actions[at[0]].microbatch != actions[last].microbatch:
        raise ScheduleError(f"stage {stage}: REDUCE bears micro-batch {actions[at[0]].microbatch}, not {actions[last]}")


def _peak_live(actions: Sequence[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += (action.kind is Kind.F) - (action.kind is Kind.B)
        peak = max(peak, live)
    return peak


class _Post(NamedTuple):
    action: Action
    time: float


@dataclass
class _Stage:
    """One simulated stage: the steps it still has to do and its own clock."""

    steps: list[Actions]
    at: int = 0
    clock: float = 0.0
    posted: list[tuple[tuple[int, int], Kind, int]] | None = None
    spans: list[Span] = field(default_factory=list)


class _Simulation:
    """All stages side by side. The n-th send from one stage to another meets the n-th receive there, as in NCCL."""

    def __init__(
        self, all_stages: Sequence[Sequence[Action]], forward_time: float, backward_time: float, buffered: bool
    ):
        self.stages = [_Stage(list(runs(actions))) for actions in all_stages]
        self.duration = {Kind.F: forward_time, Kind.B: backward_time}
        self.buffered = buffered
        self.sends: dict[tuple[int, int], list[_Post]] = {}
        self.receives: dict[tuple[int, int], list[_Post]] = {}

    def run(self) -> tuple[tuple[Span, ...], ...]:
        moved = True
        while moved:
            moved = False
            for number, stage in enumerate(self.stages):
                while stage.at < len(stage.steps) and self._step(number, stage):
                    stage.at, moved = stage.at + 1, True
        waiting = [
            f"stage {n} waits in [{' '.join(map(str, s.steps[s.at]))}]"
            for n, s in enumerate(self.stages)
            if s.at < len(s.steps)
        ]
        if waiting:
            raise ScheduleError("deadlock: " + ", ".join(waiting))
        return tuple(tuple(stage.spans) for stage in self.stages)

    def _step(self, number: int, stage: _Stage) -> bool:
        """Do the stage's next step if it can be done by now."""
        step = stage.steps[stage.at]
        if step[0].kind in COMMUNICATION:
            return self._communicate(number, stage, step)
        if step[0].kind in self.duration:
            start, stage.clock = stage.clock, stage.clock + self.duration[step[0].kind]
            stage.spans.append(Span(step[0], start, stage.clock))
        return True

    def _communicate(self, number: int, stage: _Stage, step: Actions) -> bool:
        if stage.posted is None:
            stage.posted = [self._post(number, action, stage.clock) for action in step]
        end = stage.clock
        for channel, kind, index in stage.posted:
            if self.buffered and kind in _SENDS:
                continue
            others = (self.receives if kind in _SENDS else self.sends).get(channel, [])
            if index >= len(others):
                return False
            end = max(end, others[index].time)
        stage.clock, stage.posted = end, None
        return True

    def _post(self, number: int, action: Action, time: float) -> tuple[tuple[int, int], Kind, int]:
        sending = action.kind in _SENDS
        channel = (number, peer(action, number)) if sending else (peer(action, number), number)
        mine, theirs = (self.sends, self.receives) if sending else (self.receives, self.sends)
        posts = mine.setdefault(channel, [])
        index = len(posts)
        posts.append(_Post(action, time))
        others = theirs.get(channel, [])
        if index < len(others) and others[index].action != action._replace(kind=_OTHER_END[action.kind]):
            raise ScheduleError(
                f"stage {number}: {action} meets {others[index].action} of stage {peer(action, number)}"
            )
        return channel, action.kind, index


def draw(
    all_stages: Sequence[Sequence[Action]],
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    backward: bool = True,
    width: int = 110,
) -> str:
    """A chart of the step in text, a row per stage and time to the right; a long step loses its middle."""
    report = check(all_stages, forward_time, backward_time, backward)
    cell = 1 + max(len(str(span.action)) for spans in report.spans for span in spans)
    scale = cell / (min(forward_time, backward_time) if backward else forward_time)
    label = len(f"stage {len(all_stages) - 1}")
    rows = []
    for stage, spans in enumerate(report.spans):
        cells = ["."] * round(report.makespan * scale)
        for action, start, end in spans:
            left, right = round(start * scale), round(end * scale)
            cells[left:right] = f"{action!s:-<{right - left - 1}} "
        rows.append(f"{f'stage {stage}':<{label}} |" + _elide("".join(cells), width - label - 2, cell).rstrip())
    live = " ".join(map(str, report.peak_live))
    summary = f"bubble {report.bubble:.0%} of the busiest stage's work; live micro-batches by stage: {live}"
    return "\n".join([*rows, *textwrap.wrap(summary, width)])


def _elide(cells: str, room: int, cell: int) -> str:
    """Both ends of a row that is too long, cut where a label may begin."""
    if len(cells) <= room:
        return cells
    side = (room - 4) // 2 // cell * cell
    return cells[:side] + " // " + cells[len(cells) - side :]
