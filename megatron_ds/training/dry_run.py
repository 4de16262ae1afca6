"""--dry-run: what every rank would hold, do and send, from the plan alone; nothing is started, allocated or written."""

from __future__ import annotations

import dataclasses

from megatron_ds.data.config import DataConfig
from megatron_ds.data.indexed import bin_path, idx_path
from megatron_ds.parallel.context import Axis, coordinates
from megatron_ds.parallel.spec import ParamSpec
from megatron_ds.pipeline.draw import draw
from megatron_ds.pipeline.simulate import check
from megatron_ds.training.run import Recipe, Run

GIB = 2**30
STATE_BYTES = {"master": 4, "moments": 8, "grads": 4}


@dataclasses.dataclass(frozen=True)
class StageCost:
    """Of one rank of a stage: parameters, and bytes of what is kept between and during steps."""

    parameters: int
    params_bytes: int
    grads_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.params_bytes + self.grads_bytes + self.optimizer_bytes + self.activation_bytes


def stage_tables(run: Run, recipe: Recipe) -> list[dict[str, ParamSpec]]:
    """The parameter table of every stage, from models built without memory."""
    tp = Axis("tp", run.plan.sizes["tp"], 0)
    solo = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, tp=tp))
    return [recipe.model(solo, stage).table() for stage in run.plan.stages]


def stage_costs(run: Run, recipe: Recipe) -> list[StageCost]:
    """What one rank of each stage holds; activations of the layers by the formula of Korthikanti et al. 2022."""
    plan, tp, dp = run.plan, run.plan.sizes["tp"], run.plan.sizes["dp"]
    report = check(plan.actions)
    width = 2 if run.config.precision.bf16 else 4
    out = []
    for stage, table, live in zip(plan.stages, stage_tables(run, recipe), report.peak_live, strict=True):
        count = sum(_numel(spec, tp) for spec in table.values())
        state = (STATE_BYTES["moments"] + (STATE_BYTES["master"] if width == 2 else 0)) * count
        per_layer = plan.seq_length * plan.micro_batch_size * (run.config.model.hidden_size or 0) * (10 + 24 / tp)
        activations = int(per_layer * width / 2 * (stage.stop - stage.start) * live)
        shard = dp if plan.zero_stage >= 1 else 1
        out.append(StageCost(count, count * width, count * STATE_BYTES["grads"], -(-state // shard), activations))
    return out


def report(run: Run, recipe: Recipe, vocab_note: str) -> str:
    """The whole page."""
    plan = run.plan
    tables = stage_tables(run, recipe)
    owned = [spec for table in tables for spec in table.values() if not spec.owned_by_first_stage]
    total = sum(_global_numel(spec) for spec in owned)
    sections = [
        _layout(run),
        _batch(run),
        f"model\n  parameters       {total:,} (without the padding of the vocabulary)\n"
        f"  vocabulary       {plan.vocab.size:,} tokens, padded to {plan.vocab.padded:,} ({vocab_note})",
        _memory(run, recipe),
        _messages(run, recipe),
        _schedule(run),
        _data(run.config.data),
        "dry run: nothing was started and nothing was written",
    ]
    return "\n\n".join(sections)


def _layout(run: Run) -> str:
    plan, sizes = run.plan, run.plan.sizes
    lines = [
        "layout",
        f"  world size       {plan.world_size} = "
        + " x ".join(f"{name} {size}" for name, size in sizes.items())
        + f", ZeRO stage {plan.zero_stage}, {'bf16' if run.config.precision.bf16 else 'fp32'}",
        f"  {'stage':>5}  {'layers':<26} ranks",
    ]
    for number, stage in enumerate(plan.stages):
        ranks = [r for r in range(plan.world_size) if coordinates(r, sizes)["pp"] == number]
        ends = ("embedding, " if stage.is_first else "") + f"{stage.start}-{stage.stop - 1}"
        ends += ", head" if stage.is_last else ""
        lines.append(f"  {number:>5}  {ends:<26} {ranks[0]}-{ranks[-1]}")
    return "\n".join(lines)


def _batch(run: Run) -> str:
    plan = run.plan
    dp, counts = plan.sizes["dp"], plan.samples
    return (
        "batch\n"
        f"  global batch     {plan.global_batch_size} samples = {plan.micro_batch_size} per micro-batch x "
        f"{plan.num_microbatches} micro-batches x {dp} data-parallel ranks; {plan.tokens_per_batch:,} tokens\n"
        f"  iterations       {plan.train_iters:,}\n"
        f"  samples          {counts.train:,} to train on, {counts.valid:,} to validate on, {counts.test:,} to test on"
    )


def _memory(run: Run, recipe: Recipe) -> str:
    lines = ["per rank (GiB; activations by formula, without the logits)"]
    lines.append(
        f"  {'stage':>5} {'parameters':>14} {'params':>8} {'grads':>8} {'optim':>8} {'activ.':>8} {'total':>8}"
    )
    for number, cost in enumerate(stage_costs(run, recipe)):
        parts = (cost.params_bytes, cost.grads_bytes, cost.optimizer_bytes, cost.activation_bytes, cost.total_bytes)
        lines.append(f"  {number:>5} {cost.parameters:>14,} " + " ".join(f"{part / GIB:>8.2f}" for part in parts))
    return "\n".join(lines)


def sent_bytes(run: Run, recipe: Recipe) -> list[dict[str, int]]:
    """Bytes that one rank of each stage hands to every axis in one step: the sizes of the tensors, whatever the wire.

    tp: all-reduces of activations. pp: sends. dp: fp32 gradients, and with ZeRO-1 the parameters gathered.
    embedding: the gradient of a tied table, first and last stage.
    """
    plan, width = run.plan, 2 if run.config.precision.bf16 else 4
    tp, pp, dp = (plan.sizes[name] for name in ("tp", "pp", "dp"))
    tokens = plan.seq_length * plan.micro_batch_size
    activation = tokens * (run.config.model.hidden_size or 0) * width
    out = []
    for stage, table in zip(plan.stages, stage_tables(run, recipe), strict=True):
        # Two blocks a layer, each with one all-reduce forward and one backward; the loss reduces three fp32 per token.
        reduced = 4 * (stage.stop - stage.start) + stage.is_first + stage.is_last
        per_microbatch = reduced * activation + (3 * 4 * tokens if stage.is_last else 0)
        count = sum(_numel(spec, tp) for spec in table.values())
        shared = sum(_numel(spec, tp) for spec in table.values() if spec.partial_over)
        gathered = count * width if plan.zero_stage >= 1 else 0
        out.append(
            {
                "tp": plan.num_microbatches * per_microbatch if tp > 1 else 0,
                "pp": plan.num_microbatches * activation * (2 - stage.is_first - stage.is_last) if pp > 1 else 0,
                "dp": count * STATE_BYTES["grads"] + gathered if dp > 1 else 0,
                "embedding": shared * 4 // (dp if plan.zero_stage >= 1 else 1),
            }
        )
    return out


def _messages(run: Run, recipe: Recipe) -> str:
    lines = ["sent per rank and step (GiB given to each axis)"]
    lines.append(f"  {'stage':>5} " + " ".join(f"{name:>10}" for name in ("tp", "pp", "dp", "embedding")))
    for number, sent in enumerate(sent_bytes(run, recipe)):
        lines.append(f"  {number:>5} " + " ".join(f"{value / GIB:>10.3f}" for value in sent.values()))
    return "\n".join(lines)


def _schedule(run: Run) -> str:
    plan = run.plan
    summary = check(plan.actions)
    lines = [f"schedule ({run.config.parallel.pipeline_schedule}, a backward taken as two forwards)"]
    lines += ["  " + line for line in draw(plan.actions, width=108).splitlines()]
    if plan.num_microbatches < len(plan.stages):
        share = summary.bubble / (1 + summary.bubble)
        lines.append(f"  fewer micro-batches than stages: {share:.0%} of the time is idle; raise --global-batch-size")
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


def _numel(spec: ParamSpec, tp: int) -> int:
    count = 1
    for extent in spec.local_shape(tp):
        count *= extent
    return count


def _global_numel(spec: ParamSpec) -> int:
    return _numel(dataclasses.replace(spec, split=None), 1)
