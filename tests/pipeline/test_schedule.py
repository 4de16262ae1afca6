"""Orders of work against the papers and torch's own schedules; places of messages against lists made by hand."""

from __future__ import annotations

import re
from unittest.mock import MagicMock

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from megatron_ds.pipeline.schedule import Action, Kind, ScheduleError, build, peer, runs, timeline
from tests.pipeline.by_hand import MESSAGES, SENDS, finish_times, meeting, parse, posted, rendezvous, words, work

SHAPES = [
    *((name, p, 1, m) for name in ("1f1b", "gpipe", "zbh1") for p in (1, 2, 3, 4, 8) for m in (1, 2, 5, 8, 17)),
    *(("interleaved", p, v, rounds * p) for p in (2, 3, 4, 8) for v in (1, 2, 3, 4) for rounds in (1, 2, 3)),
    *(("forward", p, v, m) for p in (2, 3, 5) for v in (1, 2, 4) for m in (1, 3, 7, 12)),
]


def test_one_f_one_b_is_the_order_of_the_paper():
    # arXiv:2104.04473, figure 4 (top) has 4 devices and 8 micro-batches.
    assert [work(actions) for actions in build("1f1b", 4, 1, 8)] == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_gpipe_is_all_forwards_then_all_backwards():
    assert [work(actions) for actions in build("gpipe", 3, 1, 3)] == ["F0 F1 F2 B0 B1 B2"] * 3


def test_interleaved_takes_two_chunks_in_turn():
    # p micro-batches through a chunk, then through the next; warm-up 2 (p - 1 - stage) + p (v - 1) forwards.
    assert [work(actions) for actions in build("interleaved", 2, 2, 4)] == [
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
    ]


def test_zbh1_delays_weight_gradients_by_the_number_of_the_stage():
    assert [work(actions) for actions in build("zbh1", 3, 1, 4)] == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_evaluation_sends_rounds_through_the_chunks():
    """No round is smaller than the number of stages, or the first stage would wait for the last one."""
    assert work(build("forward", 2, 2, 5)[0]) == "F0 F1 F0.1 F1.1 F2 F3 F4 F2.1 F3.1 F4.1"
    assert work(build("forward", 3, 2, 2)[1]) == "F0 F1 F0.1 F1.1"
    assert work(build("forward", 3, 1, 4)[2]) == "F0 F1 F2 F3"


def torch_order(schedule: type, stages: int, chunks: int, microbatches: int) -> list[str]:
    local = []
    for chunk in range(chunks):
        index = chunk * stages
        local.append(MagicMock(num_stages=stages * chunks, group_size=stages, group_rank=0, stage_index=index))
        local[-1].is_first, local[-1].is_last = index == 0, index == stages * chunks - 1
    one_stage = schedule is torch_schedules.Schedule1F1B
    order = schedule(local[0] if one_stage else local, microbatches).pipeline_order
    return [_our_words(order[rank], stages) for rank in range(stages)]


def _our_words(order: list, stages: int) -> str:
    """torch prints stage, kind, micro-batch (5F3) and leaves gaps of None."""
    found = [re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action)) for action in order]
    return words(Action(Kind(m[2]), int(m[1]) // stages, int(m[3])) for m in found if m)


@pytest.mark.parametrize(("stages", "rounds"), [(2, 1), (2, 3), (3, 2), (4, 2), (8, 3)])
def test_orders_are_those_of_torch(stages, rounds):
    microbatches = stages * rounds
    for chunks in (2, 3):
        theirs = torch_order(torch_schedules.ScheduleInterleaved1F1B, stages, chunks, microbatches)
        assert [work(a) for a in build("interleaved", stages, chunks, microbatches)] == theirs
    theirs = torch_order(torch_schedules.ScheduleInterleavedZeroBubble, stages, 1, microbatches)
    assert [work(actions) for actions in build("zbh1", stages, 1, microbatches)] == theirs
    # torch prints micro-batches 1 to m instead of 0 to m - 1 for the last stage of this one.
    theirs = torch_order(torch_schedules.Schedule1F1B, stages, 1, microbatches)[:-1]
    assert [work(actions) for actions in build("1f1b", stages, 1, microbatches)][:-1] == theirs


def test_messages_of_three_stages():
    # Worked out on paper with F = 1, B = 2. Stage 0 is done with F2 at 3, when stage 1 waits for B0, so that rF2
    # stands there although F2 follows B0. Stage 1 is done with its F2 at 8, just as stage 2 is done with B1.
    assert [posted(actions) for actions in build("1f1b", 3, 1, 3)] == [
        "F0 [sF0] F1 [sF1] F2 [sF2 rB0] B0 [rB1] B1 [rB2] B2 R",
        "[rF0] F0 [rF1 sF0] F1 [rF2 sF1 rB0] B0 [sB0] F2 [sF2 rB1] B1 [sB1 rB2] B2 [sB2] R",
        "[rF0] F0 [rF1] B0 [sB0] F1 B1 [rF2 sB1] F2 B2 [sB2] R",
    ]
    assert [posted(actions) for actions in build("forward", 3, 1, 2)] == [
        "F0 [sF0] F1 [sF1]",
        "[rF0] F0 [rF1 sF0] F1 [sF1]",
        "[rF0] F0 [rF1] F1",
    ]


def test_messages_that_go_round():
    # On paper as well. Both stages are each other's next and previous one, so that activations and gradients share
    # their channel: stage 0 sends F0, F1, F0.1, F1.1 and then the gradient that chunk 0 of stage 1 calls B0.
    assert [posted(actions) for actions in build("interleaved", 2, 2, 2)] == [
        "F0 [sF0] F1 [sF1 rF0.1] F0.1 [sF0.1 rF1.1] F1.1 [sF1.1 rB0.1] B0.1 [sB0.1 rB1.1] B1.1 [sB1.1 rB0] R.1 "
        "B0 [rB1] B1 R",
        "[rF0] F0 [rF1 sF0] F1 [rF0.1 sF1] F0.1 [rF1.1] B0.1 [sB0.1] F1.1 B1.1 [rB0 sB1.1] R.1 B0 [rB1 sB0] B1 [sB1] R",
    ]


@pytest.mark.parametrize(
    ("name", "expected"), [("1f1b", "F0 B0 F1 B1 R"), ("gpipe", "F0 F1 B0 B1 R"), ("zbh1", "F0 I0 W0 F1 I1 W1 R")]
)
def test_one_stage_sends_nothing(name, expected):
    (actions,) = build(name, 1, 1, 2)
    assert words(actions) == expected


def test_reduce_bears_the_microbatch_that_completes_the_gradients():
    for stage in range(2):
        reductions = [a for a in build("interleaved", 2, 3, 4)[stage] if a.kind is Kind.REDUCE]
        assert reductions == [Action(Kind.REDUCE, chunk, 3) for chunk in (2, 1, 0)]


def test_reductions_after_each_microbatch():
    """Messages come first, since a neighbour waits for them."""
    assert [posted(actions) for actions in build("1f1b", 2, 1, 2, reduce_each=True)] == [
        "F0 [sF0] F1 [sF1 rB0] B0 [rB1] R B1 R",
        "[rF0] F0 [rF1] B0 [sB0] R F1 B1 [sB1] R",
    ]
    assert [a for a in build("zbh1", 2, 1, 3, reduce_each=True)[1] if a.kind is Kind.REDUCE] == [
        Action(Kind.REDUCE, 0, i) for i in range(3)
    ]
    assert work(build("zbh1", 2, 1, 3, reduce_each=True)[1]) == work(build("zbh1", 2, 1, 3)[1])


def test_a_chunk_is_printed_where_there_are_several():
    actions = (Action(Kind.F, 0, 3), Action(Kind.SEND_B, 1, 12), Action(Kind.REDUCE, 1, 12))
    assert words(actions) == "F3 sB12.1 R.1"


def test_peers_are_neighbours_on_a_ring():
    neighbours = {"sF": (1, 2, 0), "rB": (1, 2, 0), "rF": (2, 0, 1), "sB": (2, 0, 1)}
    for name, others in neighbours.items():
        assert tuple(peer(Action(Kind(name), 0, 0), stage, 3) for stage in range(3)) == others


def test_steady_state_exchanges_in_one_run_per_neighbour():
    """In the steady state every run goes to one neighbour, and that neighbour answers it in one run of its own."""
    stages, microbatches = 4, 12
    all_stages = build("1f1b", stages, 1, microbatches)
    sent = [[set(map(str, run)) for run in runs(actions) if run[0].kind.value in MESSAGES] for actions in all_stages]
    exchanges = 0
    for stage in range(stages - 1):
        warmup = stages - stage - 1
        for i in range(1, microbatches - warmup):
            assert {f"sF{warmup + i}", f"rB{i}"} in sent[stage]
            assert {f"sB{i}", f"rF{warmup + i}"} in sent[stage + 1]
            exchanges += 1
    assert exchanges == 8 + 9 + 10


@pytest.mark.parametrize(("name", "p", "v", "m"), SHAPES)
def test_sends_meet_their_receives_in_order(name, p, v, m):
    """On each ordered pair of stages the n-th send is for the n-th receive, whatever it carries."""
    all_stages = build(name, p, v, m)
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for stage, actions in enumerate(all_stages):
        for action in actions:
            if action.kind.value in SENDS:
                other, receive = meeting(stage, action, p)
                sent.setdefault((stage, other), []).append(receive)
            elif action.kind.value in MESSAGES:
                source = (stage + (1 if action.kind is Kind.RECV_B else -1)) % p
                received.setdefault((source, stage), []).append(action)
    assert sent == received
    boundaries = m * (p * v - 1)
    assert sum(map(len, sent.values())) == boundaries * (1 if name == "forward" else 2)


@pytest.mark.parametrize(("name", "p", "v", "m"), SHAPES)
def test_nobody_waits_in_a_circle_even_if_every_message_blocks(name, p, v, m):
    assert rendezvous(build(name, p, v, m)) == [""] * p


@pytest.mark.parametrize(("name", "p", "v", "m"), SHAPES)
def test_a_run_is_made_by_the_time_the_next_work_starts(name, p, v, m):
    """A library that completes a run only as a whole delays nothing: worked out without `timeline`."""
    all_stages = build(name, p, v, m)
    duration = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    end = finish_times([work(actions) for actions in all_stages], duration, v - 1)
    maker = {"sF": ("F", 0), "rF": ("F", -1), "sB": ("BI", 0), "rB": ("BI", 1)}
    for stage, actions in enumerate(all_stages):
        latest = 0.0
        for action in actions:
            kind, chunk, i = action.kind.value, action.chunk, action.microbatch
            if kind in MESSAGES:
                kinds, step = maker[kind]
                chunk, source = divmod(chunk * p + stage + step, p)
                latest = max(latest, *(end.get((k, source, chunk, i), 0) for k in kinds))
            elif kind in duration:
                assert latest <= end[kind, stage, chunk, i] - duration[kind]


def test_timeline_tells_who_waits_for_what_never_comes():
    with pytest.raises(ScheduleError, match="stage 0 before B0, stage 1 before F1"):
        timeline([parse("F0 B0 F1 B1", 1), parse("F0 F1 B0 B1", 1)], 1, {Kind.F: 1, Kind.B: 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 4, 2, 8), "1f1b on 4 stages cannot have 2 chunks"),
        (("zbh1", 4, 2, 8), "cannot have 2 chunks"),
        (("interleaved", 1, 2, 8), "interleaved on 1 stages cannot have 2 chunks"),
        (("interleaved", 4, 2, 6), "6 micro-batches are no multiple of 4 stages"),
    ],
)
def test_what_no_schedule_can_do(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        build(*arguments)
