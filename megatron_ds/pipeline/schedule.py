"""Pipeline schedules as lists of actions; nothing here knows torch or a device.

    order    what a stage computes:          F0 F1 B0 F2 B1 ...
    actions  the same with its messages:     rF0 F0 [sF0 rF1] F1 [sF1 rB0] B0 [sB0 rF2] F2 ... R
    run      neighbouring messages in [ ]:   posted together

A stage holds one or several chunks of the model. Chunk c of stage s is virtual stage k = c p + s: activations go from
k to k + 1, their gradients from k to k - 1, so that with several chunks the last stage also sends to the first one.

Note [Where messages stand]
Receives bear no tag: on each ordered pair of stages the n-th send meets the n-th receive. All stages must therefore
list their messages in one common order, and no order of work says by itself which. Time does: `build` lets all stages
work through their orders at once, with messages that take no time. A message belongs to the moment at which it is made.
At either end it stands before whatever starts at that moment or later, which puts a send right behind its result.
Then nobody who follows the lists waits in a circle, not even if every send blocks until its receive is posted. And no
run delays what follows it, although NCCL completes a run as a whole: all of it was made by the time that work starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import Literal, NamedTuple


class Kind(str, Enum):
    """What an action does; the value is how it is printed. I and W are the halves of B: input and weight gradients."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"
    SEND_F = "sF"
    RECV_F = "rF"
    SEND_B = "sB"
    RECV_B = "rB"
    REDUCE = "R"


COMMUNICATION = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})
_ANSWER = {Kind.SEND_F: Kind.RECV_F, Kind.RECV_F: Kind.SEND_F, Kind.SEND_B: Kind.RECV_B, Kind.RECV_B: Kind.SEND_B}
_DOWNSTREAM = frozenset({Kind.SEND_F, Kind.RECV_B})


class Action(NamedTuple):
    """One thing that a stage does, to a chunk of its own.

    A REDUCE bears the micro-batch whose backward completed the chunk's gradients.
    """

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        number = "" if self.kind is Kind.REDUCE else str(self.microbatch)
        return f"{self.kind.value}{number}" + (f".{self.chunk}" if self.chunk else "")


Actions = tuple[Action, ...]
ScheduleName = Literal["1f1b", "gpipe", "interleaved", "zbh1", "forward"]


class ScheduleError(Exception):
    """A schedule that would hang or compute something else: a bug of ours, never a user's."""


def peer(action: Action, stage: int, num_stages: int) -> int:
    """The stage at the other end of a message."""
    return (stage + (1 if action.kind in _DOWNSTREAM else -1)) % num_stages


def answer(action: Action, stage: int, num_stages: int) -> Action:
    """What the other end calls a message: it is received by another chunk where it goes round from last to first."""
    other = peer(action, stage, num_stages)
    if action.kind in _DOWNSTREAM:
        chunk = action.chunk + (other == 0)
    else:
        chunk = action.chunk - (stage == 0)
    return Action(_ANSWER[action.kind], chunk, action.microbatch)


def messages(action: Action, stage: int, num_stages: int, num_chunks: int) -> tuple[Action | None, Action | None]:
    """The receive that an action needs and the send that it makes possible; none at the ends of the model."""
    kind, chunk, microbatch = action
    first = stage == 0 and chunk == 0
    last = stage == num_stages - 1 and chunk == num_chunks - 1
    if kind is Kind.F:
        receive = None if first else Action(Kind.RECV_F, chunk, microbatch)
        send = None if last else Action(Kind.SEND_F, chunk, microbatch)
    elif kind in (Kind.B, Kind.I):
        receive = None if last else Action(Kind.RECV_B, chunk, microbatch)
        send = None if first else Action(Kind.SEND_B, chunk, microbatch)
    else:
        receive = send = None
    return receive, send


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


class Span(NamedTuple):
    """When a stage computed an action."""

    action: Action
    start: float
    end: float


def timeline(orders: Sequence[Iterable[Action]], num_chunks: int, duration: Mapping[Kind, float]) -> list[list[Span]]:
    """When every stage computes what if it never rests while its next action has its input; messages take no time.

    Raises: ScheduleError if every stage waits
    """
    todo = [[action for action in order if action.kind in duration] for order in orders]
    done: list[list[Span]] = [[] for _ in orders]
    arrival: dict[tuple[int, Action], float] = {}
    moved = True
    while moved:
        moved = False
        for stage, (order, spans) in enumerate(zip(todo, done, strict=True)):
            while len(spans) < len(order):
                action = order[len(spans)]
                receive, send = messages(action, stage, len(orders), num_chunks)
                if receive and (stage, receive) not in arrival:
                    break
                start = max(spans[-1].end if spans else 0, arrival[stage, receive] if receive else 0)
                spans.append(Span(action, start, start + duration[action.kind]))
                if send:
                    arrival[peer(send, stage, len(orders)), answer(send, stage, len(orders))] = spans[-1].end
                moved = True
    stuck = [f"stage {s} before {todo[s][len(done[s])]}" for s in range(len(orders)) if len(done[s]) < len(todo[s])]
    if stuck:
        raise ScheduleError("inputs that never come: " + ", ".join(stuck))
    return done


def _one_f_one_b(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> Actions:
    """A backward as soon as one can run: stage s keeps at most `num_stages - s` micro-batches live.

    Source: Narayanan et al. 2021, arXiv:2104.04473, sec. 2.2 (the non-interleaved schedule)
    """
    forwards, backwards = _all(Kind.F, num_microbatches), _all(Kind.B, num_microbatches)
    return _alternate(forwards, backwards, warmup=num_stages - 1 - stage)


def _gpipe(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> Actions:
    """All forwards, then all backwards: every micro-batch is live at the turn.

    Source: Huang et al. 2019, arXiv:1811.06965
    """
    return _all(Kind.F, num_microbatches) + _all(Kind.B, num_microbatches)


def _interleaved(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> Actions:
    """1F1B over chunks: `num_stages` micro-batches through one chunk, then the same ones through the next.

    Raises: ScheduleError if num_microbatches % num_stages != 0
    Source: Narayanan et al. 2021, arXiv:2104.04473, sec. 2.3
    """
    if num_microbatches % num_stages:
        raise ScheduleError(f"{num_microbatches} micro-batches are no multiple of {num_stages} stages")
    forwards, backwards = [], []
    for k in range(num_microbatches * num_chunks):
        chunk = k // num_stages % num_chunks
        microbatch = k // (num_stages * num_chunks) * num_stages + k % num_stages
        forwards.append(Action(Kind.F, chunk, microbatch))
        backwards.append(Action(Kind.B, num_chunks - 1 - chunk, microbatch))
    warmup = 2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages
    return _alternate(tuple(forwards), tuple(backwards), warmup)


def _zbh1(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> Actions:
    """1F1B with split backwards, whose weight halves run `stage` micro-batches later and fill the idle time at the end.

    Live are `num_stages` micro-batches on every stage, as many as on the first stage of 1F1B.

    Source: Qi et al. 2023, arXiv:2401.10241 (ZB-H1)
    """
    inputs, weights = _all(Kind.I, num_microbatches), _all(Kind.W, num_microbatches)
    order = []
    for action in _alternate(_all(Kind.F, num_microbatches), inputs, warmup=num_stages - 1 - stage):
        order.append(action)
        if action.kind is Kind.I and action.microbatch >= stage:
            order.append(weights[action.microbatch - stage])
    return tuple(order) + weights[max(0, num_microbatches - stage) :]


def _forward_only(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> Actions:
    """Forwards for evaluation, by rounds of at least `num_stages` micro-batches so that no stage waits for the last."""
    rounds = max(1, num_microbatches // num_stages)
    edges = [number * num_microbatches // rounds for number in range(rounds + 1)]
    return tuple(
        Action(Kind.F, chunk, microbatch)
        for begin, end in pairwise(edges)
        for chunk in range(num_chunks)
        for microbatch in range(begin, end)
    )


def _all(kind: Kind, num_microbatches: int) -> Actions:
    return tuple(Action(kind, 0, microbatch) for microbatch in range(num_microbatches))


def _alternate(forwards: Actions, backwards: Actions, warmup: int) -> Actions:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    order = list(forwards[:warmup])
    for pair in zip(forwards[warmup:], backwards, strict=False):
        order += pair
    return (*order, *backwards[len(forwards) - warmup :])


_ORDERS: Mapping[ScheduleName, Callable[[int, int, int, int], Actions]] = {
    "1f1b": _one_f_one_b,
    "gpipe": _gpipe,
    "interleaved": _interleaved,
    "zbh1": _zbh1,
    "forward": _forward_only,
}
_TIMES = {Kind.F: 1, Kind.B: 2, Kind.I: 1, Kind.W: 1}
_MESSAGE, _REDUCTION, _COMPUTE = range(3)
"""Of what belongs to one moment: nobody should wait for a message because of a reduction or of the next work."""


@lru_cache
def build(
    name: ScheduleName, num_stages: int, num_chunks: int, num_microbatches: int, reduce_each: bool = False
) -> tuple[Actions, ...]:
    """The actions of every stage, messages included; gradients are reduced once per chunk, or after each micro-batch.

    Raises: ScheduleError for several chunks where the schedule or a single stage cannot have them
    """
    if num_chunks > 1 and (name not in ("interleaved", "forward") or num_stages == 1):
        raise ScheduleError(f"{name} on {num_stages} stages cannot have {num_chunks} chunks per stage")
    orders = [_ORDERS[name](stage, num_stages, num_chunks, num_microbatches) for stage in range(num_stages)]
    return with_messages(orders, num_chunks, reduce_each)


def with_messages(orders: Sequence[Actions], num_chunks: int, reduce_each: bool = False) -> tuple[Actions, ...]:
    """Orders with their messages and reductions; see Note [Where messages stand]."""
    placed: list[list[tuple[float, int, int, Action]]] = [[] for _ in orders]
    number = 0
    for stage, spans in enumerate(timeline(orders, num_chunks, _TIMES)):
        completes = {span.action.chunk: span.action for span in spans if span.action.kind in (Kind.B, Kind.W)}
        next_starts = [span.start for span in spans[1:]] + [math.inf]
        for (action, start, end), next_start in zip(spans, next_starts, strict=True):
            number += 1
            placed[stage].append((start, _COMPUTE, number, action))
            _, send = messages(action, stage, len(orders), num_chunks)
            if send:
                other = peer(send, stage, len(orders))
                placed[stage].append((end, _MESSAGE, number, send))
                placed[other].append((end, _MESSAGE, number, answer(send, stage, len(orders))))
            if action is completes.get(action.chunk) or (reduce_each and action.kind in (Kind.B, Kind.W)):
                placed[stage].append((next_start, _REDUCTION, number, action._replace(kind=Kind.REDUCE)))
    return tuple(tuple(action for *_, action in sorted(entries, key=itemgetter(0, 1, 2))) for entries in placed)
