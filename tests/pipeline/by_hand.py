"""Schedules as words, and what a schedule means, written out without the package's own arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_ds.pipeline.schedule import Action, Kind, runs

KINDS = {kind.value: kind for kind in Kind}
SENDS = {"sF": ("rF", 1), "sB": ("rB", -1)}
MESSAGES = ("sF", "rF", "sB", "rB")


def words(actions: Iterable[Action]) -> str:
    return " ".join(map(str, actions))


def posted(actions: Iterable[Action]) -> str:
    """Words with messages that are posted together in brackets."""
    steps = runs(actions)
    return " ".join(f"[{words(step)}]" if step[0].kind.value in MESSAGES else words(step) for step in steps)


def work(actions: Iterable[Action]) -> str:
    """Words of what a stage computes."""
    return words(action for action in actions if action.kind.value not in (*MESSAGES, "R"))


def parse(text: str, last: int) -> tuple[Action, ...]:
    """Actions from their printed form; `last` is the micro-batch that REDUCE bears."""
    out = []
    for word in text.split():
        word, _, chunk = word.partition(".")
        name = word.rstrip("0123456789")
        out.append(Action(KINDS[name], int(chunk or 0), int(word[len(name) :] or last)))
    return tuple(out)


def meeting(stage: int, action: Action, stages: int) -> tuple[int, Action]:
    """Where a send arrives, and as what, from virtual stages counted along the model."""
    name, step = SENDS[action.kind.value]
    chunk, other = divmod(action.chunk * stages + stage + step, stages)
    return other, Action(KINDS[name], chunk, action.microbatch)


def rendezvous(all_stages: Sequence[Sequence[Action]]) -> list[str]:
    """What every stage still has to do when nobody can go on, if each message by itself blocks both of its ends."""
    left = [list(actions) for actions in all_stages]
    moved = True
    while moved:
        moved = False
        for stage, todo in enumerate(left):
            while todo and todo[0].kind.value not in MESSAGES:
                todo.pop(0)
                moved = True
            if todo and todo[0].kind.value in SENDS:
                other, receive = meeting(stage, todo[0], len(left))
                if left[other] and left[other][0] == receive:
                    todo.pop(0)
                    left[other].pop(0)
                    moved = True
    return [words(todo) for todo in left]


def finish_times(
    orders: Sequence[str], duration: dict[str, float], last_chunk: int = 0
) -> dict[tuple[str, int, int, int], float]:
    """End of every (kind, stage, chunk, micro-batch), by relaxing until nothing can change any more.

    A stage works in order; F waits for F one virtual stage before, B and I for B and I one virtual stage after.
    """
    stages = len(orders)
    jobs = [[(a.kind.value, a.chunk, a.microbatch) for a in parse(order, 0)] for order in orders]
    end: dict[tuple[str, int, int, int], float] = {}
    for _ in range(sum(map(len, jobs))):
        before = dict(end)
        for stage, todo in enumerate(jobs):
            clock = 0.0
            for kind, chunk, i in todo:
                virtual = chunk * stages + stage + {"F": -1, "B": 1, "I": 1, "W": 0}[kind]
                ready = 0.0
                if kind != "W" and 0 <= virtual < stages * (last_chunk + 1):
                    ready = end.get((kind, virtual % stages, virtual // stages, i), float("inf"))
                clock = max(clock, ready) + duration[kind]
                end[kind, stage, chunk, i] = clock
        if end == before:
            break
    return end
