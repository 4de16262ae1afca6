"""Schedules against the papers' figures and formulas, and against an event recurrence written out here."""

from __future__ import annotations

import pytest

from megatron_ds.pipeline.schedule import (
    Action,
    Kind,
    ScheduleError,
    build,
    check,
    draw,
    gpipe,
    one_f_one_b,
    peer,
    runs,
    with_communication,
)

SIZES = [(p, m) for p in range(1, 9) for m in (1, 2, 3, 4, 7, 8, 16, 31, 32)]
KINDS = {kind.value: kind for kind in Kind}


def words(actions) -> str:
    return " ".join(map(str, actions))


def parse(text: str, last: int) -> tuple[Action, ...]:
    """Actions from their printed form; `last` is the micro-batch that REDUCE bears."""
    out = []
    for word in text.split():
        name = word.rstrip("0123456789")
        out.append(Action(KINDS[name], 0, int(word[len(name) :] or last)))
    return tuple(out)


def test_one_f_one_b_is_the_order_of_the_paper():
    # arXiv:2104.04473, figure 4 (top) has 4 devices and 8 micro-batches.
    assert [words(one_f_one_b(stage, 4, 8)) for stage in range(4)] == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7 R",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7 R",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7 R",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 R",
    ]


def test_gpipe_is_all_forwards_then_all_backwards():
    assert words(gpipe(1, 4, 3)) == "F0 F1 F2 B0 B1 B2 R"


def test_messages_of_three_stages():
    assert [words(actions) for actions in build("1f1b", 3, 3)] == [
        "F0 sF0 F1 sF1 F2 sF2 rB0 B0 rB1 B1 rB2 B2 R",
        "rF0 F0 sF0 rF1 F1 sF1 rB0 B0 sB0 rF2 F2 sF2 rB1 B1 sB1 rB2 B2 sB2 R",
        "rF0 F0 B0 sB0 rF1 F1 B1 sB1 rF2 F2 B2 sB2 R",
    ]
    assert [words(actions) for actions in build("forward", 3, 2)] == [
        "F0 sF0 F1 sF1",
        "rF0 F0 sF0 rF1 F1 sF1",
        "rF0 F0 rF1 F1",
    ]


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_one_stage_sends_nothing(name):
    (actions,) = build(name, 1, 2)
    assert words(actions) == {"1f1b": "F0 B0 F1 B1 R", "gpipe": "F0 F1 B0 B1 R"}[name]


def test_reduce_bears_the_microbatch_that_completes_the_gradients():
    assert one_f_one_b(0, 2, 5)[-1] == Action(Kind.REDUCE, 0, 4)


def test_a_chunk_is_printed_where_there_are_several():
    actions = (Action(Kind.F, 0, 3), Action(Kind.SEND_B, 1, 12), Action(Kind.REDUCE, 1, 12))
    assert words(actions) == "F3 sB12.1 R.1"


def test_steady_state_exchanges_in_one_run_per_neighbour():
    """In the steady state every run goes to one neighbour, and that neighbour answers it in one run of its own."""
    stages, microbatches = 4, 12
    all_runs = [list(runs(actions)) for actions in build("1f1b", stages, microbatches)]
    assert all(sum(all_runs[s], ()) == build("1f1b", stages, microbatches)[s] for s in range(stages))
    messages = [
        [run for run in stage_runs if run[0].kind not in (Kind.F, Kind.B, Kind.REDUCE)] for stage_runs in all_runs
    ]
    exchanges = 0
    for stage in range(stages - 1):
        warmup = stages - stage - 1
        for i in range(microbatches - warmup - 1):
            mine = (Action(Kind.SEND_F, 0, warmup + i), Action(Kind.RECV_B, 0, i))
            theirs = (Action(Kind.SEND_B, 0, i), Action(Kind.RECV_F, 0, warmup + i))
            assert mine in messages[stage]
            assert theirs in messages[stage + 1]
            assert {peer(a, stage) for a in mine} == {stage + 1}
            assert {peer(a, stage + 1) for a in theirs} == {stage}
            exchanges += 1
    assert exchanges == 8 + 9 + 10


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_published_facts(name, stages, microbatches):
    report = check(build(name, stages, microbatches), forward_time=1.0, backward_time=2.0)
    assert report.makespan == (microbatches + stages - 1) * 3
    assert report.bubble == pytest.approx((stages - 1) / microbatches, abs=1e-12)
    assert report.idle == pytest.approx([(stages - 1) / (microbatches + stages - 1)] * stages, abs=1e-12)
    live = [min(stages - s, microbatches) if name == "1f1b" else microbatches for s in range(stages)]
    assert report.peak_live == tuple(live)


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_evaluation_pipelines_its_forwards(stages, microbatches):
    report = check(build("forward", stages, microbatches), backward=False)
    assert report.makespan == microbatches + stages - 1


def makespan_by_recurrence(orders: list[str], forward: float, backward: float) -> float:
    """Ready times only: a stage works in order, F waits for the stage before, B for the stage after. No messages."""
    jobs = [[(word[0], int(word[1:])) for word in order.split() if word != "R"] for order in orders]
    end: dict[tuple[str, int, int], float] = {}
    for _ in range(sum(map(len, jobs))):  # relax until nothing can change any more
        for stage, todo in enumerate(jobs):
            clock = 0.0
            for kind, i in todo:
                other = stage - 1 if kind == "F" else stage + 1
                ready = end.get((kind, other, i), float("inf")) if 0 <= other < len(jobs) else 0.0
                clock = max(clock, ready) + (forward if kind == "F" else backward)
                end[kind, stage, i] = clock
    return max(end.values())


@pytest.mark.parametrize("times", [(1.0, 1.0), (0.7, 1.9), (2.0, 1.0)])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 5), (3, 2), (4, 6), (5, 9)])
@pytest.mark.parametrize("order", [one_f_one_b, gpipe])
def test_simulated_time_is_the_longest_chain_of_dependencies(order, stages, microbatches, times):
    orders = [order(s, stages, microbatches) for s in range(stages)]
    report = check([with_communication(o, s, stages) for s, o in enumerate(orders)], *times)
    assert report.makespan == pytest.approx(makespan_by_recurrence([words(o) for o in orders], *times))


def swap(actions: str, one: str, other: str) -> str:
    return " ".join({one: other, other: one}.get(word, word) for word in actions.split())


FAULTS = {
    "missing forward": (0, lambda s: s.replace(" F1 ", " "), "F1 occurs 0 times"),
    "missing backward": (1, lambda s: s.replace(" B2 ", " "), "B2 occurs 0 times"),
    "doubled forward": (0, lambda s: s.replace(" F1 ", " F1 F1 "), "F1 occurs 2 times"),
    "missing send": (0, lambda s: s.replace(" sF2 ", " "), "sF2 occurs 0 times"),
    "missing receive": (0, lambda s: s.replace("rB0 ", ""), "rB0 occurs 0 times"),
    "send into nowhere": (2, lambda s: s.replace("F0 B0", "F0 sF0 B0"), "sF0 has no place"),
    "backward before forward": (2, lambda s: s.replace("F0 B0", "B0 F0"), "B0 stands before F0"),
    "forward before its input": (1, lambda s: s.replace("rF0 F0", "F0 rF0"), "F0 stands before rF0"),
    "send before the result": (0, lambda s: s.replace("F0 sF0", "sF0 F0"), "sF0 stands before F0"),
    "missing reduce": (1, lambda s: s.replace(" R", ""), "reduced 0 times"),
    "early reduce": (0, lambda s: s.replace("rB2 B2 R", "R rB2 B2"), "R stands before B2"),
    "messages out of order": (0, lambda s: swap(swap(s, "F0", "F1"), "sF0", "sF1"), "meets"),
    # Stage 0 now wants gradient 0 before it computes forward 1, which stage 1 wants before it gives gradient 0.
    "deadlock": (0, lambda s: "F0 sF0 rB0 B0 F1 sF1 rB1 B1 F2 sF2 rB2 B2 R", "deadlock"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    stage, damage, message = FAULTS[fault]
    stages = [words(actions) for actions in build("1f1b", 3, 3)]
    if fault == "deadlock":
        stages = [words(actions) for actions in build("gpipe", 3, 3)]
    damaged = damage(stages[stage])
    assert damaged != stages[stage]
    check([parse(text, 2) for text in stages])
    stages[stage] = damaged
    with pytest.raises(ScheduleError, match=message):
        check([parse(text, 2) for text in stages])


def test_sends_that_only_buffers_could_save_are_a_deadlock():
    """Stage 0 sits in sF2 while stage 1 sits in sB0: neither posts its receive until its own send is taken."""
    first = "F0 sF0 F1 sF1 F2 sF2 F3 sF3 rB0 B0 rB1 B1 rB2 B2 rB3 B3 R"
    second = "rF0 F0 rF1 F1 B0 sB0 B1 sB1 rF2 F2 rF3 F3 B2 sB2 B3 sB3 R"
    with pytest.raises(ScheduleError, match=r"deadlock: stage 0 waits in \[sF2\], stage 1 waits in \[sB0\]"):
        check([parse(first, 3), parse(second, 3)])


def test_reduce_must_name_the_last_backward():
    with pytest.raises(ScheduleError, match="REDUCE bears micro-batch 0"):
        check([parse("F0 B0 F1 B1 R", 0)])


def test_drawing_of_two_stages():
    assert draw(build("1f1b", 2, 2)).splitlines() == [
        "stage 0 |F0 F1 ......B0--- ...B1---",
        "stage 1 |...F0 B0--- F1 B1--- ......",
        "bubble 50% of the busiest stage's work; live micro-batches by stage: 2 1",
    ]


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (4, 8), (8, 32), (16, 128), (64, 200)])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_drawings_fit_the_page(name, stages, microbatches):
    drawing = draw(build(name, stages, microbatches))
    lines = drawing.splitlines()
    assert drawing.isascii()
    assert max(map(len, lines)) <= 110
    assert [line.split("|")[0].split() for line in lines[:stages]] == [["stage", str(s)] for s in range(stages)]
    assert f"B{microbatches - 1}" in lines[0], "the end of the step is shown"
