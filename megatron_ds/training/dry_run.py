"""--dry-run: what every rank would hold, do and send; nothing is started, allocated or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import torch

from megatron_ds.data.config import DataConfig
from megatron_ds.data.indexed import bin_path, idx_path
from megatron_ds.parallel.spec import ParamSpec
from megatron_ds.pipeline.draw import draw
from megatron_ds.pipeline.simulate import check
from megatron_ds.training.costs import Costs, Paper, in_all, kind_of, on_paper
from megatron_ds.training.run import Recipe, Run, Stage

GIB = 2**30
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
UNKNOWN = (
    "Not in these figures: fragmentation, NCCL's buffers, the CUDA context, what a kernel takes and gives back inside,",
    "and what the optimizer needs while it updates.",
)


def report(run: Run, recipe: Recipe, vocab_note: str) -> str:
    """The whole page. Without --device cpu it is about GPUs."""
    plan, config = run.plan, run.config
    run = dataclasses.replace(run, device=torch.device("cpu" if config.parallel.device == "cpu" else "cuda"))
    table = recipe.model(run, Stage(0, config.model.total_layers, is_first=True, is_last=True)).table()
    costs = stage_costs(run, recipe)
    sections = [
        _layout(run),
        _batch(run),
        f"model\n  parameters       {sum(map(_numel, table.values())):,} (without the padding of the vocabulary)\n"
        f"  vocabulary       {plan.vocab.size:,} tokens, padded to {plan.vocab.padded:,} ({vocab_note})",
        _memory(costs),
        _activations(run, costs),
        _messages(costs),
        _schedule(run),
        _data(config.data),
        "dry run: nothing was started and nothing was written",
    ]
    return "\n\n".join(sections)


def stage_costs(run: Run, recipe: Recipe) -> list[Costs]:
    """Of a step of the full batch, for the first rank of every stage."""
    plan, papers = run.plan, dict[tuple[Hashable, ...], Paper]()
    count, per_stage = plan.num_microbatches, plan.world_size // plan.sizes["pp"]
    out = []
    for stage, actions in enumerate(plan.actions(count)):
        kinds = tuple(kind_of(run.config.model, chunk) for chunk in plan.stages[stage])
        if kinds not in papers:
            papers[kinds] = on_paper(run, recipe, stage * per_stage)
        out.append(in_all(papers[kinds], actions, count))
    return out


def _layout(run: Run) -> str:
    plan, sizes = run.plan, run.plan.sizes
    lines = [
        "layout",
        f"  world size       {plan.world_size} = "
        + " x ".join(f"{name} {size}" for name, size in sizes.items())
        + f", ZeRO stage {plan.zero_stage}, {PRECISIONS[run.dtype]}",
        f"  {'stage':>5}  {'layers':<26} ranks",
    ]
    per_stage = plan.world_size // sizes["pp"]
    for number, chunks in enumerate(plan.stages):
        layers = " + ".join(_layers(chunk) for chunk in chunks)
        lines.append(f"  {number:>5}  {layers:<26} {number * per_stage}-{(number + 1) * per_stage - 1}")
    return "\n".join(lines)


def _layers(chunk: Stage) -> str:
    ends = "embedding, " * chunk.is_first, ", head" * chunk.is_last
    layers = f"{chunk.start}-{chunk.stop - 1}" if chunk.stop - chunk.start > 1 else f"{chunk.start}"
    return f"{ends[0]}{layers}{ends[1]}"


def _batch(run: Run) -> str:
    plan = run.plan
    dp, counts, growing = plan.sizes["dp"], plan.samples, plan.batches
    lines = [
        "batch",
        f"  global batch     {plan.global_batch_size} samples = {plan.micro_batch_size} per micro-batch x "
        f"{plan.num_microbatches} micro-batches x {dp} data-parallel ranks; {plan.tokens_per_batch:,} tokens",
        f"  iterations       {plan.train_iters:,}",
        f"  samples          {counts.train:,} to train on, {counts.valid:,} to validate on, {counts.test:,} to test on",
    ]
    if len(growing.batches) > 1:
        changes = f"{growing.batches[0]} at first, {growing.final} from sample {growing.starts[-1]:,} on"
        lines.insert(2, f"  growing batch    {changes}, in {len(growing.batches) - 1} steps; below is of the full one")
    return "\n".join(lines)


def _memory(costs: list[Costs]) -> str:
    names = ("params", "grads", "optim", "activ.", "total")
    lines = ["per rank (GiB at the fullest moment of a step)", _row("stage", f"{'parameters':>16}", names)]
    for number, cost in enumerate(costs):
        parameters, *held = cost.held
        parts = (*held, cost.peak_bytes, cost.total_bytes)
        lines.append(_row(number, f"{parameters:>16,}", [f"{part / GIB:.2f}" for part in parts]))
    return "\n".join([*lines, *(f"  {line}" for line in UNKNOWN)])


def _activations(run: Run, costs: list[Costs]) -> str:
    recompute = run.config.recompute
    names = ("kept", "+ in use", "live")
    lines = ["activations (GiB kept between actions, GiB that a running one needs besides, micro-batches kept)"]
    lines.append(_row("stage", "", names))
    for number, cost in enumerate(costs):
        used = cost.peak_bytes - cost.activation_bytes
        lines.append(_row(number, "", (f"{cost.activation_bytes / GIB:.2f}", f"{used / GIB:.2f}", f"{cost.live:.2f}")))
    again = {None: "nothing", "full": f"whole layers ({recompute.method}, {recompute.num_layers})"}
    what = again.get(recompute.granularity) or ", ".join(recompute.recompute_modules)
    lines.append(f"  recomputed: {what}; attention as {'on CPUs' if run.device.type == 'cpu' else 'flash on GPUs'}")
    if recompute.checkpoint_in_cpu:
        lines.append("  --checkpoint-in-cpu moves the inputs of recomputed layers to the host; they are counted here")
    return "\n".join(lines)


def _messages(costs: list[Costs]) -> str:
    """Only collectives that somebody has."""
    names = [name for name in dict.fromkeys(n for cost in costs for n in cost.sent) if not name.startswith("world ")]
    if not names:
        return "sent per rank and step\n  nothing: one rank"
    lines = ["sent per rank and step (GiB that leave the rank; dp_cp is dp x cp)"]
    for number in range(0, len(names), 5):
        some = sorted(names)[number : number + 5]
        lines.append(_row("stage", "", some, 21))
        lines += [
            _row(stage, "", [f"{cost.sent[name] / GIB:.3f}" for name in some], 21) for stage, cost in enumerate(costs)
        ]
    return "\n".join(lines)


def _row(stage: object, first: str, cells: Sequence[str], width: int = 9) -> str:
    return f"  {stage:>5}{first}" + "".join(f"{cell:>{width}}" for cell in cells)


def _schedule(run: Run) -> str:
    plan, recomputes = run.plan, run.config.recompute.granularity == "full"
    actions = plan.actions(plan.num_microbatches)
    backward = 3.0 if recomputes else 2.0
    lines = [f"schedule ({plan.schedule}, a backward taken as {'three' if recomputes else 'two'} forwards)"]
    lines += ["  " + line for line in draw(actions, backward_time=backward, width=108).splitlines()]
    if plan.num_microbatches < len(plan.stages):
        idle = min(check(actions, backward_time=backward).idle)
        lines.append(f"  fewer micro-batches than stages: {idle:.0%} of the time is idle; raise --global-batch-size")
    return "\n".join(lines)


def _data(config: DataConfig) -> str:
    words = [*config.data_path, *config.train_data_path, *config.valid_data_path, *config.test_data_path]
    prefixes = [word for word in words if not _is_number(word)]
    if config.mock_data:
        return "data\n  random tokens (--mock-data)"
    if not prefixes:
        return "data\n  none given: a real run needs --data-path"
    lines = [
        f"  {prefix}: " + ("found" if idx_path(prefix).exists() and bin_path(prefix).exists() else "not found here")
        for prefix in prefixes
    ]
    return "\n".join(["data", *lines])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _numel(spec: ParamSpec) -> int:
    return math.prod(spec.shape)
