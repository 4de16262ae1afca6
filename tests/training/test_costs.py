"""Bytes sent and held, counted in real steps: equal to formulas worked out by hand, and to what was predicted."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_ds import log
from megatron_ds.config import parse
from megatron_ds.parallel import context, launch
from megatron_ds.parallel.context import ParallelContext
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.plan import make_plan
from megatron_ds.training.costs import Costs, Held, held, predict
from megatron_ds.training.engine import build_engine
from megatron_ds.training.meter import Meter
from megatron_ds.training.run import Run, chosen_kernels
from megatron_ds.training.step import train_step
from tests.helpers.ranks import run_ranks
from tests.parity import harness
from tests.parity.harness import RECIPE, RECIPES, STYLES, ModelType, arguments, batches, fresh, start
from tests.reference.bert import BertConfig
from tests.reference.t5 import T5Config

S, B, H, LAYERS, HEADS, VOCAB, ROWS = 32, 2, 64, 4, 8, 256, 32
"""Of the tests' model: positions, samples of a micro-batch, width, layers, heads, padded vocabulary, position table."""
PARAMETERS = VOCAB * H + ROWS * H + LAYERS * (12 * H * H + 13 * H) + 2 * H
FP32, BF16, FP64 = 4, 2, 8

BUCKET = 20_000
"""Elements that are reduced together, by the harness; up to three halves of one come from the other rank at once."""


class Rank(NamedTuple):
    """Where a rank stands, and what its step cost."""

    stage: int
    measured: Costs


def one_step(argv: list[str], model: Any, kind: ModelType) -> Rank:
    """Run on every rank."""
    engine = start(argv, kind)
    engine.initialise()
    meter = Meter(engine)
    metered(engine, meter, model)
    assert meter.costs is not None
    context.stop()
    return Rank(engine.run.parallel.pp.rank, meter.costs)


def metered(engine: Any, meter: Meter, model: Any) -> None:
    """One step of the parity harness inside the meter."""

    def inside(engine: Any, schedule: Any, progress: Any, *others: Any, **flags: Any) -> Any:
        with meter.step(progress):
            return train_step(engine, schedule, progress, *others, **flags)

    harness.train_step = inside
    harness.steps(engine, fresh(engine), batches(model, 1))


def ranks_of(world_size: int, flags: str, model: Any = STYLES["gpt2"], kind: ModelType = "GPT") -> list[Rank]:
    """One real step in that layout; the prediction is of the very bytes."""
    argv = arguments(model, *flags.split())
    found: list[Rank] = run_ranks(one_step, world_size, argv, model, kind)
    run = planned(argv, world_size, kind)
    for number, (_, measured) in enumerate(found):
        predicted = predict(run, RECIPES[kind], number, measured.num_microbatches)
        assert predicted.sent == measured.sent
        assert predicted.held == measured.held
        assert predicted.live == measured.live
        # gloo's messages need buffers, and its threads may let go of a tensor a moment late.
        buffers = 2 * BSH * FP32 + (3 * BUCKET * FP32 // 2 if run.plan.zero_stage == 2 else 0)
        for before, after in zip(activations(predicted), activations(measured), strict=True):
            assert before <= after <= before + buffers
    return found


def planned(argv: list[str], world_size: int, kind: ModelType = "GPT") -> Run:
    """A run that nobody has started."""
    config, cpu = parse(argv, {"model_type": kind}), torch.device("cpu")
    assert config.tokenizer.vocab_size
    plan = make_plan(config, world_size, config.tokenizer.vocab_size + 1)
    return Run(config, plan, ParallelContext.solo(), chosen_kernels(config, cpu).kernels, cpu, None, DropoutStreams(0))


def activations(costs: Costs) -> tuple[int, int]:
    return costs.activation_bytes, costs.peak_bytes


def world_bytes(world_size: int) -> float:
    """Six fp64 numbers that end a step."""
    return 2 * (world_size - 1) / world_size * 6 * FP64


def all_reduced(n: float, ranks: int) -> float:
    """Bytes that leave a rank when n bytes are all-reduced over so many."""
    return 2 * (ranks - 1) / ranks * n


def scattered(n: float, ranks: int) -> float:
    """The same for an all-gather or a reduce-scatter of n bytes, the whole tensor."""
    return (ranks - 1) / ranks * n


BSH = B * S * H
LOSS = 3 * B * S * FP32
"""A token's largest log-sum-exp, and two sums."""
NORMS = (LAYERS * 6 * H + 2 * H + ROWS * H) * FP32
"""fp32 gradients of what every tensor-parallel rank has: norms, biases behind row-parallel matrices, position table."""


def tensor_parallel(t: int, m: int, per_layer: int) -> dict[str, float]:
    """per_layer all-reduces of bsh in each layer; the embedding's in the forward, the head's in the backward."""
    return {"tp all-reduce": m * all_reduced((per_layer * LAYERS + 2) * BSH * FP32 + LOSS, t)}


def sequence_parallel(t: int, m: int, width: int) -> dict[str, float]:
    """Of each layer's four all-reduces both halves, and its two inputs X gathered once more for the weights' gradients.

    The embedding scatters and its backward gathers; the head gathers, scatters and gathers X again.
    """
    return {
        "tp all-gather": m * scattered((LAYERS * (4 + 2) + 1 + 2) * BSH * width, t),
        "tp reduce-scatter": m * scattered((LAYERS * 4 + 1 + 1) * BSH * width, t),
        "tp all-reduce": m * all_reduced(LOSS, t) + all_reduced(NORMS, t),
    }


@pytest.mark.parametrize(
    ("world_size", "flags", "expected"),
    [
        (2, "--tensor-model-parallel-size 2", tensor_parallel(2, 4, per_layer=4)),
        (4, "--tensor-model-parallel-size 4", tensor_parallel(4, 4, per_layer=4)),
        (
            2,
            "--tensor-model-parallel-size 2 --recompute-granularity full",
            tensor_parallel(2, 4, per_layer=6),  # x 1.5: the forward's two again
        ),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel", sequence_parallel(2, 4, FP32)),
        (4, "--tensor-model-parallel-size 4 --sequence-parallel --bf16", sequence_parallel(4, 4, BF16)),
        # the gradients of all parameters, in fp32; sizes divide, so that nothing is padded
        (2, "", {"dp_cp all-reduce": all_reduced(PARAMETERS * FP32, 2)}),
        (4, "--bf16", {"dp_cp all-reduce": all_reduced(PARAMETERS * FP32, 4)}),
        (
            4,
            "--bf16 --zero-stage 1",
            {
                "dp_cp reduce-scatter": scattered(PARAMETERS * FP32, 4),
                "dp_cp all-gather": scattered(PARAMETERS * BF16, 4),
            },
        ),
        (
            2,
            "--bf16 --zero-stage 2",  # gradients leave after every one of two micro-batches
            {
                "dp_cp reduce-scatter": 2 * scattered(PARAMETERS * FP32, 2),
                "dp_cp all-gather": scattered(PARAMETERS * BF16, 2),
            },
        ),
        # K and V of h/c positions go round forward; backward they do again, with their gradients
        (
            2,
            "--context-parallel-size 2",
            {
                "cp send": 4 * LAYERS * 3 * scattered(2 * BSH * FP32, 2),
                "dp_cp all-reduce": all_reduced(PARAMETERS * FP32, 2),
            },
        ),
        (
            4,
            "--context-parallel-size 4 --bf16",
            {
                "cp send": 4 * LAYERS * 3 * scattered(2 * BSH * BF16, 4),
                "dp_cp all-reduce": all_reduced(PARAMETERS * FP32, 4),
            },
        ),
        # Q, K, V and the output of s/c positions forward, the same backward
        (
            4,
            "--ds-sequence-parallel-size 4",
            {
                "cp all-to-all": 4 * LAYERS * 2 * scattered(4 * BSH / 4 * FP32, 4),
                "dp_cp all-reduce": all_reduced(PARAMETERS * FP32, 4),
            },
        ),
    ],
)
def test_bytes_sent_are_those_of_the_formulas(world_size: int, flags: str, expected: dict[str, float]) -> None:
    for rank in ranks_of(world_size, flags):
        assert rank.measured.sent == {**expected, "world all-reduce": world_bytes(world_size)}


def sends(stage: int, stages: int, chunks: int) -> int:
    """Boundaries of virtual stages that a stage sends across, for one micro-batch: activations down, gradients up."""
    return 2 * chunks - (stage == 0) - (stage == stages - 1)


@pytest.mark.parametrize(
    ("world_size", "flags", "stages", "chunks", "microbatches", "message"),
    [
        (4, "--pipeline-model-parallel-size 4", 4, 1, 4, BSH * FP32),
        (2, "--pipeline-model-parallel-size 2 --pipeline-schedule gpipe --bf16", 2, 1, 4, BSH * BF16),
        (2, "--pipeline-model-parallel-size 2 --pipeline-schedule zbh1", 2, 1, 4, BSH * FP32),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 2, 2, 4, BSH * FP32),
        (
            4,
            "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --bf16",
            2,
            1,
            4,
            BSH * BF16 / 2,
        ),
        (2, "--pipeline-model-parallel-size 2 --bf16 --fp32-residual-connection", 2, 1, 4, BSH * FP32),
    ],
)
def test_stages_send_activations_and_their_gradients(
    world_size: int, flags: str, stages: int, chunks: int, microbatches: int, message: float
) -> None:
    for rank in ranks_of(world_size, flags):
        assert rank.measured.sent["pp send"] == microbatches * sends(rank.stage, stages, chunks) * message
        table = VOCAB * H // (2 if "tensor" in flags else 1)
        ends = all_reduced(table * FP32, 2) if rank.stage in (0, stages - 1) else 0
        assert rank.measured.sent["embedding all-reduce"] == ends


BERT = BertConfig(num_layers=2, hidden=H, heads=HEADS, kv_heads=HEADS, ffn=4 * H, vocab=VOCAB, max_positions=S)
T5 = T5Config(
    encoder_layers=2,
    decoder_layers=2,
    hidden=H,
    heads=HEADS,
    kv_heads=HEADS,
    ffn=4 * H,
    vocab=VOCAB,
    max_positions=S,
    lengths=(S, S // 2),
    positions="relative",
)
OTHERS: list[tuple[ModelType, Any, str, str, float]] = [
    # 4 micro-batches, 2 layers, forward and backward: half of a rank's part of q, k, v and the output leaves it.
    ("BERT", BERT, "--ds-sequence-parallel-size 2", "cp all-to-all", 4 * 2 * 2 * (3 + 1) * S // 2 * B * H * FP32 // 2),
    # 4 micro-batches: S + S/2 positions, and 4 rows for two tables of 32 x 8.
    ("T5", T5, "--pipeline-model-parallel-size 2", "pp send", 4 * (S + S // 2 + 4) * B * H * FP32),
]


@pytest.mark.parametrize(("kind", "model", "flags", "name", "sent"), OTHERS, ids=["BERT", "T5"])
def test_bert_and_t5_cost_what_was_predicted(kind: ModelType, model: Any, flags: str, name: str, sent: float) -> None:
    for rank in ranks_of(2, f"--micro-batch-size {B} {flags}", model, kind):
        assert rank.measured.sent[name] == sent


def counted_outside(argv: list[str], style: str) -> tuple[Counter[str], Counter[str]]:
    """Run on every rank: our counters of one step, and bytes reckoned from what torch was asked to do.

    On gloo, reduce-scatters and all-gathers are made of messages. What goes through memory torch does not see.
    """
    engine = start(argv)
    engine.initialise()
    for axis in engine.run.parallel.axes:
        axis.memory.largest = 0
    asked: Counter[str] = Counter()
    all_reduce, all_to_all, send = dist.all_reduce, dist.all_to_all_single, dist.ProcessGroup.send

    def listen_all_reduce(tensor: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        asked["all-reduce"] += int(all_reduced(tensor.nbytes, group.size()))
        return all_reduce(tensor, *args, group=group, **kwargs)

    def listen_all_to_all(out: torch.Tensor, *args: Any, group: Any) -> Any:
        asked["all-to-all"] += int(scattered(out.nbytes, group.size()))
        return all_to_all(out, *args, group=group)

    def listen_send(group: Any, tensors: list[torch.Tensor], *args: Any) -> Any:
        asked["send"] += sum(tensor.nbytes for tensor in tensors)
        return send(group, tensors, *args)

    dist.all_reduce, dist.all_to_all_single = listen_all_reduce, listen_all_to_all
    dist.ProcessGroup.send = listen_send
    harness.steps(engine, fresh(engine), batches(STYLES[style], 1))
    counted: Counter[str] = Counter()
    for axis in engine.run.parallel.axes:
        for name, sent in axis.traffic.sent_bytes.items():
            counted["send" if name in ("reduce-scatter", "all-gather") else name] += sent
    context.stop()
    return counted, asked


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --bf16",
        "--context-parallel-size 2 --zero-stage 2",
        "--ds-sequence-parallel-size 2 --tensor-model-parallel-size 2 --recompute-granularity full --zero-stage 1",
    ],
)
def test_counters_miss_nothing_that_torch_is_asked_to_send(flags: str) -> None:
    for counted, asked in run_ranks(counted_outside, 4, arguments(STYLES["llama"], *flags.split()), "llama"):
        assert counted == asked


# ---- what is held between steps

WIDE = """--num-layers 8 --hidden-size 768 --num-attention-heads 12 --seq-length 64 --micro-batch-size 1 --train-iters 1
    --lr 1e-4 --bf16 --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --device cpu"""


def states() -> list[tuple[Held, int]]:
    """Run on every rank: for ZeRO-0, 1 and 2 the counted bytes, and those of all tensors that Python knows."""
    launch.adopt_environment()
    parallel, found, cpu = None, [], torch.device("cpu")
    for zero_stage in (0, 1, 2):
        config = parse([*WIDE.split(), "--zero-stage", str(zero_stage)])
        plan = make_plan(config, log.world_size(), 256)
        parallel = parallel or context.start(config.parallel, plan.sizes, cpu)
        run = Run(
            config,
            plan,
            parallel,
            chosen_kernels(config, cpu).kernels,
            cpu,
            None,
            DropoutStreams(0),
        )
        older = storages()
        engine = build_engine(run, RECIPE)
        mine = {address: size for address, size in storages().items() if address not in older}
        found.append((held(engine), sum(mine.values())))
        del engine
        gc.collect()
    context.stop()
    return found


def storages() -> dict[int, int]:
    """Address and bytes of every storage."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def test_bytes_held_with_eight_ranks_are_those_of_zero() -> None:
    n, h = 8, 768
    p = 256 * h + 64 * h + 8 * (12 * h * h + 13 * h) + 2 * h
    assert p >= 50_000_000
    # parameters in bf16, gradients in fp32, then master, mean and mean of squares in fp32
    parts = [(2, 4, 12), (2, 4, 12 / n), (2, 4 / n, 12 / n)]
    totals = [18, 6 + 12 / n, 2 + 16 / n]
    for rank in run_ranks(states, n):
        for (counted, everything), each, total in zip(rank, parts, totals, strict=True):
            assert counted.parameters == p
            assert list(counted[1:]) == pytest.approx([p * width for width in each], rel=0.01)
            assert everything == pytest.approx(total * p, rel=0.01)


# ---- activations

LAYER_BYTES = 64 * S * H + 4 * HEADS * S + 16 * S
"""Of one sample in fp32: inputs of the norms, of the four matrices and of the GELU, query, key, value: 16 s h numbers;
a log-sum-exp per head and position; mean and deviation of two norms. (Of 34 s b h bytes in 16 bits 32 are left: there
is no dropout.)"""


def interleaved(stage: int, p: int, v: int) -> float:
    """p (1 + (p-1)/(pv)) on the first stage."""
    return p * (1 + (p - 1) / (p * v)) - 2 * stage / v


@pytest.mark.parametrize(
    ("flags", "chunks", "live"),
    [
        ("--pipeline-schedule gpipe", 1, lambda stage: 8),
        ("--pipeline-schedule 1f1b", 1, lambda stage: min(4 - stage, 8)),
        ("--num-layers-per-virtual-pipeline-stage 1", 2, lambda stage: interleaved(stage, 4, 2)),
        ("--pipeline-schedule zbh1", 1, lambda stage: 4),
    ],
)
def test_live_activations_are_those_of_the_schedule(flags: str, chunks: int, live: Callable[[int], float]) -> None:
    # Blocks of rows, which CPUs use for short sequences otherwise, keep probabilities.
    model = "--pipeline-model-parallel-size 4 --num-layers 8 --micro-batch-size 1 --attention-backend flash "
    message = S * H * FP32
    for rank in ranks_of(4, model + flags):
        assert rank.measured.live == live(rank.stage)
        if rank.stage in (1, 2):  # neither embedding nor head
            # Between its halves a backward keeps the inputs of matrices and the gradients of their outputs: no more.
            each = 2 * LAYER_BYTES + chunks * message
            fewest = 0.8 if "zbh1" in flags else 1
            # and perhaps what neighbours have sent for the next actions
            assert fewest * live(rank.stage) * each <= rank.measured.activation_bytes
            assert rank.measured.activation_bytes <= live(rank.stage) * each + 3 * message
