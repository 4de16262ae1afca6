"""--verify-parallel: the user's model, shrunk, in the layout asked for and in one process; every gradient compared.

Every rank trains the whole tiny model for itself as well, so that it can hold its own pieces of the gradients against
it; only the findings travel. Where the two disagree, the layout is tried again with one thing at a time put back, the
data-parallel axis taking up the ranks, until the axis at fault is known.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_ds import log
from megatron_ds.config import Config
from megatron_ds.data.batch import Batch, collate_for
from megatron_ds.errors import EXIT_FAULT, EXIT_OK, ConfigError
from megatron_ds.model.config import RecomputeConfig
from megatron_ds.model.init import initial_values
from megatron_ds.optim.lr import lr_schedule
from megatron_ds.parallel import context
from megatron_ds.parallel.collectives import gather_bytes
from megatron_ds.parallel.context import Axis, ParallelContext
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.parallel.spec import Init, Piece
from megatron_ds.plan import Plan, SampleCounts, make_plan
from megatron_ds.timers import Timers
from megatron_ds.training.engine import Engine, build_engine
from megatron_ds.training.progress import Progress
from megatron_ds.training.run import Recipe, Run, agree_on_kernels, as_splits, chosen_kernels
from megatron_ds.training.shrink import STEPS, Small, plain, shrink
from megatron_ds.training.step import train_step

LIMITS = {"loss": 1e-5, "gradient norm": 2e-5}
GRADIENT_LIMIT = 1e-4
"""Relative differences that two orders of summation may make in fp32; of gradients: to the tensor's largest element."""
WORST = 5


class Trained(NamedTuple):
    """What this rank saw of a run: loss and gradient norm of every step, and its pieces of every gradient."""

    history: list[tuple[float, float]]
    gradients: list[list[Piece]]

    def whole(self) -> list[dict[str, torch.Tensor]]:
        """Every step's gradients, where one process has all of them."""
        return [_assembled(pieces) for pieces in self.gradients]


@dataclass(frozen=True)
class Finding:
    """How far a quantity of one step is from the truth, relative; infinite where a part of it is missing."""

    step: int
    quantity: str
    error: float

    @property
    def is_equal(self) -> bool:
        """True within rounding."""
        return self.error <= LIMITS.get(self.quantity, GRADIENT_LIMIT)

    def __str__(self) -> str:
        return f"{self.quantity} of step {self.step + 1}, by {self.error:.1e}"


def verify(recipe: Recipe, config: Config, device: torch.device) -> int:
    """Compare the layout with one process, and say what was found; 0, or the code of a run-time fault.

    Comm: rendezvous of the world; the steps of up to ten tiny runs
    """
    world_size = log.world_size()
    small = shrink(config, world_size)
    plan = make_plan(small.config, world_size, small.vocab_size)
    log.info("\n".join(_introduction(config, small, plan)))
    if world_size > 1:
        context.join(config.parallel, device)
    truth = _train(recipe, plain(small.config), small.vocab_size, device, ParallelContext.solo())
    trained, findings = _try(recipe, small.config, small.vocab_size, device, truth)
    log.info("\n".join(_table(trained, truth, findings)))
    different = _different(findings)
    if different:
        worst = _first(different)
        others = sum(finding.step == worst.step for finding in different) - 1
        log.info(f"DIFFERENT: {worst}, and {others} other quantities of that step")
        log.info(f"at fault: {_search(recipe, small, device, truth)}")
    elif world_size == 1:
        log.info("one process: there is no other rank to compare with; it agrees with itself")
    else:
        log.info(f"EQUAL: {world_size} ranks train the same model as one process")
    context.stop()
    return EXIT_FAULT if different else EXIT_OK


def _try(
    recipe: Recipe, config: Config, vocab_size: int, device: torch.device, truth: Trained
) -> tuple[Trained, list[Finding]]:
    """Train in the layout of `config` and compare.

    Comm: process groups of the layout; the steps of one run; two gathers of bytes over the world
    """
    plan = make_plan(config, log.world_size(), vocab_size)
    solo = plan.world_size == 1
    parallel = ParallelContext.solo() if solo else context.build_axes(config.parallel, plan.sizes, device)
    trained = _train(recipe, config, vocab_size, device, parallel)
    return trained, _compare(trained, truth, parallel.world)


def _train(recipe: Recipe, config: Config, vocab_size: int, device: torch.device, parallel: ParallelContext) -> Trained:
    """A few steps from weights and on tokens that depend on the seed only."""
    plan = make_plan(config, parallel.world.size, vocab_size)
    streams = DropoutStreams(config.training.seed, device_type=device.type)
    chosen = chosen_kernels(config, device)
    agree_on_kernels(chosen, parallel.world)
    engine = build_engine(Run(config, plan, parallel, chosen.kernels, device, None, streams), recipe)
    _set_weights(engine)
    schedule = lr_schedule(config.lr, config.optimizer, None, plan.global_batch_size, STEPS)
    progress, trained = Progress(), Trained([], [])
    rows = as_splits(recipe.datasets(engine.run, SampleCounts(STEPS * plan.global_batch_size, 0, 0))).train
    for step in range(STEPS):
        batches = _batches(engine.run, rows, step)
        result = train_step(engine, schedule, progress, batches, Timers(), stop=False, out_of_time=False)
        progress = progress.after_step(plan.global_batch_size, result.skipped, result.next_loss_scale)
        trained.history.append((sum(result.losses.values()), result.grad_norm))
        trained.gradients.append(list(_gradients(engine, result.grad_norm)))
    return trained


def _set_weights(engine: Engine) -> None:
    """Random values everywhere: with biases at zero and norms at one, a lost bias would not be missed."""
    run, tp = engine.run, engine.run.parallel.tp
    assert run.config.model.hidden_size
    std = 0.8 / math.sqrt(run.config.model.hidden_size)
    with torch.no_grad():
        for name, spec in engine.table.items():
            random = dataclasses.replace(spec, init=Init("normal", std))
            values = initial_values(random, run.config.training.seed, tp.rank, tp.size)
            engine.optimizer.set_values(name, (values + (spec.init.kind == "ones")).to(run.device))


def _batches(run: Run, rows: Any, step: int) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches of a global batch in which samples differ in their target tokens."""
    plan, dp, size = run.plan, run.parallel.dp, run.plan.micro_batch_size
    collate = collate_for(run.config.model.model_type, run.config.data, eod=0)
    for row in range(dp.rank * size, plan.global_batch_size, dp.size * size):
        numbers = range(step * plan.global_batch_size + row, step * plan.global_batch_size + row + size)
        batch = collate([rows[number] for number in numbers])
        length = batch.loss_mask.shape[1]
        kept = torch.tensor([length if number % 7 == 0 else number * 5 % length for number in numbers])
        ragged = batch.loss_mask * (torch.arange(length) < kept.unsqueeze(1))
        yield dataclasses.replace(batch, loss_mask=ragged)


def _gradients(engine: Engine, norm: float) -> Iterator[Piece]:
    """This rank's pieces before clipping, so that a wrong norm does not look like wrong gradients.

    Over all ranks every element is there once.
    """
    tp, limit = engine.run.parallel.tp, engine.run.config.optimizer.clip_grad
    clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    for segment in engine.optimizer.segments:
        if engine.optimizer.saves(segment.spec):
            yield from segment.spec.flat_pieces(segment.grad / clip, segment.start, tp.rank, tp.size)


def _compare(trained: Trained, truth: Trained, world: Axis) -> list[Finding]:
    """Every quantity of every step, as the ranks together see it.

    Comm: one gather of bytes over the world
    """
    wholes = truth.whole()
    mine = [_differences(pieces, whole) for pieces, whole in zip(trained.gradients, wholes, strict=True)]
    everyone = [json.loads(payload) for payload in gather_bytes(json.dumps(mine).encode(), world)]
    out = []
    for step, (one, other) in enumerate(zip(trained.history, truth.history, strict=True)):
        for what, found, true in zip(LIMITS, one, other, strict=True):
            out.append(Finding(step, what, _relative(abs(found - true), abs(true))))
        for name, gradient in wholes[step].items():
            rows = [rank[step][name] for rank in everyone if name in rank[step]]
            is_whole = sum(count for _, count in rows) == gradient.numel()
            error = max((_finite(difference) for difference, _ in rows), default=math.inf)
            out.append(Finding(step, name, _relative(error, gradient.abs().max().item()) if is_whole else math.inf))
    return out


def _assembled(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for piece in pieces:
        whole = out.setdefault(piece.name, piece.tensor.new_zeros(piece.global_shape))
        whole[piece.box.slices()] = piece.tensor
    return out


def _differences(pieces: list[Piece], truth: dict[str, torch.Tensor]) -> dict[str, tuple[float, int]]:
    """By parameter: the largest difference of this rank's elements, and how many these are."""
    out: dict[str, tuple[float, int]] = {}
    for piece in pieces:
        error, count = out.get(piece.name, (0.0, 0))
        difference = (piece.tensor - truth[piece.name][piece.box.slices()]).abs().max().item()
        out[piece.name] = max(_finite(error), _finite(difference)), count + piece.tensor.numel()
    return out


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def _relative(error: float, size: float) -> float:
    return _finite(error) / size if size else (0.0 if error == 0 else math.inf)


class _Change(NamedTuple):
    """One thing put back: its name and flag, and the configuration without it."""

    name: str
    flag: str
    config: Config


def _changes(config: Config) -> Iterator[_Change]:
    """From the special to the general: without tensor parallelism there is no sequence parallelism either."""
    parallel, optimizer, recompute = config.parallel, config.optimizer, config.recompute
    one_order = {
        "pipeline_schedule": None,
        "enable_zbh1_pipeline": False,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
    }
    ends = {"decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None}
    if recompute.granularity:
        yield _Change(
            "recomputation", "--recompute-granularity", dataclasses.replace(config, recompute=RecomputeConfig())
        )
    if optimizer.overlap_param_gather:
        gathered = dataclasses.replace(optimizer, overlap_param_gather=False)
        yield _Change(
            "overlap of the parameters' gather",
            "--overlap-param-gather",
            dataclasses.replace(config, optimizer=gathered),
        )
    if optimizer.effective_zero_stage:
        whole = dataclasses.replace(
            optimizer, zero_stage=0, use_distributed_optimizer=False, overlap_param_gather=False
        )
        name = f"ZeRO-{optimizer.effective_zero_stage}"
        yield _Change(name, "--zero-stage", dataclasses.replace(config, optimizer=whole))
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1:
        yield _without("sequence parallelism", "--sequence-parallel", config, sequence_parallel=False)
    if parallel.schedule_name != "1f1b":
        yield _without(f"the {parallel.schedule_name} schedule", "--pipeline-schedule", config, **one_order)
    if parallel.context_size > 1:
        ulysses = parallel.ds_sequence_parallel_size > 1
        yield _without(
            f"context parallelism by {'all-to-all' if ulysses else 'a ring'}",
            "--ds-sequence-parallel-size" if ulysses else "--context-parallel-size",
            config,
            context_parallel_size=1,
            ds_sequence_parallel_size=1,
        )
    if parallel.tensor_model_parallel_size > 1:
        spread = dataclasses.replace(recompute, distribute_saved_activations=False)
        yield _without(
            "tensor parallelism",
            "--tensor-model-parallel-size",
            dataclasses.replace(config, recompute=spread),
            tensor_model_parallel_size=1,
            sequence_parallel=False,
        )
    if parallel.pipeline_model_parallel_size > 1:
        yield _without(
            "pipeline parallelism",
            "--pipeline-model-parallel-size",
            config,
            pipeline_model_parallel_size=1,
            pp_partition_method=None,
            pipeline_model_parallel_split_rank=None,
            **one_order,
            **ends,
        )


def _without(name: str, flag: str, config: Config, **parallel: object) -> _Change:
    changed = dataclasses.replace(config.parallel, **parallel)  # type: ignore[arg-type]
    return _Change(name, flag, dataclasses.replace(config, parallel=changed))


def _search(recipe: Recipe, small: Small, device: torch.device, truth: Trained) -> str:
    """Name the axis at fault; what becomes of each change is told as soon as it is known."""
    log.info("looking for the axis at fault: one thing put back at a time, data parallelism takes up the ranks")
    for change in _changes(small.config):
        try:
            if _vanishes(change, recipe, small.vocab_size, device, truth):
                return f"{change.name} ({change.flag}): without it the difference vanishes"
        except ConfigError as error:
            log.info(f"  without {change.name:<38} not possible: {error.subject}")
    alone = _Change("all but data parallelism", "", plain(small.config))
    if not _vanishes(alone, recipe, small.vocab_size, device, truth):
        return "data parallelism: with everything else put back the ranks still differ from one process"
    return "several axes together: no single change makes the difference vanish, all of them together do"


def _vanishes(change: _Change, recipe: Recipe, vocab_size: int, device: torch.device, truth: Trained) -> bool:
    _, findings = _try(recipe, change.config, vocab_size, device, truth)
    different = _different(findings)
    log.info(f"  without {change.name:<38} {f'different: {_first(different)}' if different else 'equal'}")
    return not different


def _different(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.is_equal]


def _first(different: list[Finding]) -> Finding:
    """The worst of the first step that differs, for later steps start from spoilt weights; a parameter before sums."""
    here = [finding for finding in different if finding.step == different[0].step]
    return max([finding for finding in here if finding.quantity not in LIMITS] or here, key=lambda f: f.error)


def _introduction(config: Config, small: Small, plan: Plan) -> list[str]:
    model, parallel, sizes = config.model, small.config.parallel, plan.sizes
    layout = [f"{name} {sizes[name]}" for name in ("tp", "cp", "pp", "dp")]
    layout += ["sequence parallel"] * parallel.sequence_parallel
    layout += [f"schedule {parallel.schedule_name}", f"zero {plan.zero_stage}"]
    layout += [f"recompute {small.config.recompute.granularity}"] if small.config.recompute.granularity else []
    kept = [
        f"{model.positions.replace('_', ' ')} positions",
        model.normalization,
        model.activation,
        "biases" if model.add_bias_linear else "no biases",
        "untied" if model.untie_embeddings_and_output_weights else "tied embeddings",
        f"vocabulary {plan.vocab.size} padded to {plan.vocab.padded}",
    ]
    return [
        f"verifying: {plan.world_size} rank{'s' * (plan.world_size > 1)} ({', '.join(layout)}) against one process",
        f"the model in small, fp32, {STEPS} steps, random tokens with a ragged loss mask; kept: {', '.join(kept)}",
        *(f"  {name:<38} {before:>12} -> {after}" for name, before, after in small.changes),
    ]


def _table(trained: Trained, truth: Trained, findings: list[Finding]) -> list[str]:
    lines = ["step           loss   one process  difference | grad norm   one process  difference | worst gradient"]
    for step, ((loss, norm), (true_loss, true_norm)) in enumerate(zip(trained.history, truth.history, strict=True)):
        here = {finding.quantity: finding.error for finding in findings if finding.step == step}
        worst = max(error for quantity, error in here.items() if quantity not in LIMITS)
        lines.append(
            f"{step + 1:>4} {loss:>14.6f} {true_loss:>13.6f} {here['loss']:>11.1e} |{norm:>10.6f} {true_norm:>13.6f} "
            f"{here['gradient norm']:>11.1e} | {worst:.1e}"
        )
    worst_of = dict[str, Finding]()
    for finding in findings:
        known = worst_of.get(finding.quantity)
        if finding.quantity not in LIMITS and (known is None or finding.error > known.error):
            worst_of[finding.quantity] = finding
    ranked = sorted(worst_of.values(), key=lambda finding: -finding.error)[:WORST]
    lines.append(f"{len(worst_of)} gradients, the furthest apart (relative to the tensor's largest element):")
    lines += [f"  {one.quantity:<58} step {one.step + 1}  {one.error:.1e}" for one in ranked]
    limits = ", ".join(f"{name} {limit:.0e}" for name, limit in (*LIMITS.items(), ("gradients", GRADIENT_LIMIT)))
    return [*lines, f"limits: {limits}"]
