"""Costs against the papers' formulas and a recurrence written out here; faults planted to see them found."""

from __future__ import annotations

import pytest

from megatron_ds.pipeline.schedule import Kind, ScheduleError, build, with_messages
from megatron_ds.pipeline.simulate import check
from tests.pipeline.by_hand import finish_times, parse, words, work

FEW = (1, 2, 3, 4, 7, 8, 16, 24)


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize("p", range(1, 9))
def test_published_facts(name, p):
    for m in FEW:
        report = check(build(name, p, 1, m), forward_time=1.0, backward_time=2.0)
        assert report.makespan == (m + p - 1) * 3
        assert report.bubble == pytest.approx((p - 1) / m, abs=1e-12)
        assert report.idle == pytest.approx([(p - 1) / (m + p - 1)] * p, abs=1e-12)
        assert report.peak_live == tuple(min(p - s, m) if name == "1f1b" else m for s in range(p))


@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize("p", range(2, 9))
def test_interleaving_divides_the_bubble_and_keeps_more_alive(p, v):
    """arXiv:2104.04473, sec. 2.3: (p - 1) / (v m) of ideal time lost, p (1 + (p - 1) / (p v)) micro-batches live."""
    for m in range(p, 25, p):
        report = check(build("interleaved", p, v, m), forward_time=1.0, backward_time=2.0)
        assert report.bubble == pytest.approx((p - 1) / (v * m), abs=1e-9)
        assert report.makespan == pytest.approx(3 * m + 3 * (p - 1) / v)
        if m >= 2 * p:
            assert report.peak_live[0] == p * v + p - 1
            assert report.peak_live[-1] == p * (v - 1) + 1


@pytest.mark.parametrize("p", range(1, 9))
def test_zero_bubble_loses_a_third_of_1f1b(p):
    """arXiv:2401.10241: (p - 1)(F + I - W) of time, p micro-batches live."""
    for m in FEW:
        report = check(build("zbh1", p, 1, m), forward_time=1.0, backward_time=2.0)
        assert report.peak_live == (min(p, m),) * p
        if m >= p:
            assert report.makespan == 3 * m + p - 1
            assert report.bubble == pytest.approx(check(build("1f1b", p, 1, m)).bubble / 3)
    # W of two thirds of a forward, I of four: (p - 1) (1 + 4/3 - 2/3)
    report = check(build("zbh1", p, 1, 24), forward_time=1.0, backward_time=2.0, weight_time=2 / 3)
    assert report.makespan == pytest.approx(24 * 3 + (p - 1) * 5 / 3)


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("p", range(2, 9))
def test_evaluation_pipelines_its_forwards(p, v):
    for m in FEW:
        report = check(build("forward", p, v, m), forward_time=1.0, backward=False)
        # Fewer micro-batches than stages: every chunk but the last one waits until its first micro-batch comes round.
        chunk_times = m * v + p - 1 if m >= p else p * v + m - 1
        assert report.makespan == pytest.approx(chunk_times / v)
        assert report.peak_live == (0,) * p


@pytest.mark.slow
@pytest.mark.parametrize("p", range(1, 9))
def test_every_small_schedule_can_run(p):
    for m in range(1, 25):
        for name in ("1f1b", "gpipe", "zbh1"):
            check(build(name, p, 1, m))
        for v in range(1, 5 if p > 1 else 2):
            check(build("forward", p, v, m), backward=False)
            if m % p == 0:
                check(build("interleaved", p, v, m))


def test_few_messages_wait_to_be_used():
    """Both stages of a pair run F or B at a time, so that at most one message per direction waits."""
    for p in (2, 4, 8):
        assert max(check(build("1f1b", p, 1, 24)).peak_waiting) <= 2
        assert max(check(build("gpipe", p, 1, 24)).peak_waiting) <= 1
        assert max(check(build("zbh1", p, 1, 24)).peak_waiting) <= 2
        assert max(check(build("interleaved", p, 3, 24)).peak_waiting) <= 4
    by_hand = [parse("F0 sF0 F1 sF1 rB0 rB1 B0 B1 R", 1), parse("rF0 F0 rF1 F1 B0 sB0 B1 sB1 R", 1)]
    assert check(by_hand).peak_waiting == (2, 1)


@pytest.mark.parametrize("times", [(1.0, 1.0), (0.7, 1.9), (2.0, 1.0)])
@pytest.mark.parametrize(
    ("name", "p", "v", "m"),
    [("1f1b", 2, 1, 5), ("1f1b", 5, 1, 9), ("gpipe", 3, 1, 2), ("interleaved", 3, 2, 6), ("zbh1", 4, 1, 6)],
)
def test_simulated_time_is_the_longest_chain_of_dependencies(name, p, v, m, times):
    all_stages = build(name, p, v, m)
    forward, backward = (time / v for time in times)
    duration = {"F": forward, "B": backward, "I": backward * 0.7, "W": backward * 0.3}
    end = finish_times([work(actions) for actions in all_stages], duration, v - 1)
    report = check(all_stages, *times, weight_time=0.3 * times[1])
    assert report.makespan == pytest.approx(max(end.values()))
    for stage, spans in enumerate(report.spans):
        for action, _, stop in spans:
            assert stop == pytest.approx(end[action.kind.value, stage, action.chunk, action.microbatch])


def swap(actions: str, one: str, other: str) -> str:
    return " ".join({one: other, other: one}.get(word, word) for word in actions.split())


ONE_F_ONE_B = ("1f1b", 3, 1, 3)
INTERLEAVED = ("interleaved", 2, 2, 4)
SPLIT = ("zbh1", 2, 1, 3)
FAULTS = {
    "missing forward": (ONE_F_ONE_B, 0, lambda s: s.replace(" F1 ", " "), "F1 occurs 0 times"),
    "missing backward": (ONE_F_ONE_B, 1, lambda s: s.replace(" B2 ", " "), "B2 occurs 0 times"),
    "doubled forward": (ONE_F_ONE_B, 0, lambda s: s.replace(" F1 ", " F1 F1 "), "F1 occurs 2 times"),
    "missing send": (ONE_F_ONE_B, 0, lambda s: s.replace(" sF2 ", " "), "sF2 occurs 0 times"),
    "missing receive": (ONE_F_ONE_B, 0, lambda s: s.replace("rB0 ", ""), "rB0 occurs 0 times"),
    "send into nowhere": (ONE_F_ONE_B, 2, lambda s: s.replace(" F0 ", " F0 sF0 "), "sF0 has no place"),
    "backward before forward": (ONE_F_ONE_B, 2, lambda s: swap(s, "F0", "B0"), "B0 stands before F0"),
    "forward before its input": (ONE_F_ONE_B, 1, lambda s: s.replace("rF0 F0", "F0 rF0"), "F0 stands before rF0"),
    "send before the result": (ONE_F_ONE_B, 0, lambda s: s.replace("F0 sF0", "sF0 F0"), "sF0 stands before F0"),
    "late send": (ONE_F_ONE_B, 0, lambda s: s.replace("sF0 F1 ", "F1 sF0 "), "sF0 does not stand right behind F0"),
    "missing reduce": (ONE_F_ONE_B, 1, lambda s: s.replace(" R", ""), "reduced 0 times"),
    "early reduce": (ONE_F_ONE_B, 0, lambda s: s.replace("rB2 B2 R", "R rB2 B2"), "R stands before B2"),
    "reduce before weight gradients": (SPLIT, 1, lambda s: s.replace("W2 R", "R W2"), "R stands before W2"),
    "weights before inputs": (SPLIT, 0, lambda s: swap(s, "I1", "W1"), "W1 stands before"),
    "missing weights": (SPLIT, 1, lambda s: s.replace(" W1", ""), "W1 occurs 0 times"),
    "whole backward among halves": (SPLIT, 0, lambda s: s.replace(" R", " B2 R"), "B2 has no place"),
    "swapped forwards": (ONE_F_ONE_B, 0, lambda s: swap(swap(s, "F0", "F1"), "sF0", "sF1"), "calls rF1, but there rF0"),
    "swapped receives of chunks": (INTERLEAVED, 1, lambda s: swap(s, "rF2", "rB0"), "but there"),
    "reduction of the wrong chunk": (INTERLEAVED, 0, lambda s: s.replace(" R.1", " R"), "chunk 0 is reduced 2 times"),
    "missing wrap-around": (INTERLEAVED, 1, lambda s: s.replace(" sF0 ", " "), "sF0 occurs 0 times"),
    # Stage 0 now wants gradient 0 before it computes forward 1, which stage 1 wants before it gives gradient 0.
    "deadlock": (("gpipe", 3, 1, 3), 0, lambda s: "F0 sF0 rB0 B0 F1 sF1 rB1 B1 F2 sF2 rB2 B2 R", "deadlock"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    schedule, stage, damage, message = FAULTS[fault]
    last = schedule[-1] - 1
    stages = [words(actions) for actions in build(*schedule)]
    damaged = damage(stages[stage])
    assert damaged != stages[stage]
    check([parse(text, last) for text in stages])
    stages[stage] = damaged
    with pytest.raises(ScheduleError, match=message):
        check([parse(text, last) for text in stages])


def test_two_receives_in_another_order_than_their_sends():
    """Both belong to one channel, stand in one run and come in time; only their order is wrong."""
    stages = [words(actions) for actions in build("interleaved", 2, 2, 4)]
    assert " rB0 rF3 " in stages[1]
    stages[1] = swap(stages[1], "rB0", "rF3")
    with pytest.raises(ScheduleError, match="stage 0 sends what stage 1 calls rB0, but there rF3 meets it"):
        check([parse(text, 3) for text in stages])


def test_sends_that_only_buffers_could_save_are_a_deadlock():
    """Stage 0 sits in sF2 while stage 1 sits in sB0: neither posts its receive until its own send is taken."""
    first = "F0 sF0 F1 sF1 F2 sF2 F3 sF3 rB0 B0 rB1 B1 rB2 B2 rB3 B3 R"
    second = "rF0 F0 rF1 F1 B0 sB0 B1 sB1 rF2 F2 rF3 F3 B2 sB2 B3 sB3 R"
    with pytest.raises(ScheduleError, match=r"deadlock: stage 0 waits in \[sF2\], stage 1 waits in \[sB0\]"):
        check([parse(first, 3), parse(second, 3)])
    # The same work with its messages where time puts them.
    orders = [parse(work(parse(text, 3)), 3) for text in (first, second)]
    check(with_messages(orders, 1))


def test_reduce_must_name_the_last_backward():
    with pytest.raises(ScheduleError, match="reduced for micro-batch 0"):
        check([parse("F0 B0 F1 B1 R", 0)])


def test_reductions_of_each_microbatch_follow_their_backwards():
    for schedule in (("1f1b", 3, 1, 4), ("interleaved", 2, 2, 4), ("zbh1", 3, 1, 4)):
        stages = list(build(*schedule, reduce_each=True))
        assert check(stages).makespan == check(build(*schedule)).makespan
        reductions = [at for at, action in enumerate(stages[0]) if action.kind is Kind.REDUCE]
        early = list(stages[0])
        early.insert(0, early.pop(reductions[1]))
        with pytest.raises(ScheduleError, match=r"stands before|is reduced"):
            check([tuple(early), *stages[1:]])
        missing = [action for at, action in enumerate(stages[0]) if at != reductions[1]]
        with pytest.raises(ScheduleError, match="is reduced"):
            check([missing, *stages[1:]])
