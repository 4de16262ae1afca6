"""The search for legal layouts near one that is not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Literal, NamedTuple

from megatron_ds.config import Config
from megatron_ds.errors import ConfigError
from megatron_ds.rules_batch import batch_unit, check_batch, nearest_batch
from megatron_ds.rules_layout import (
    check_heads,
    check_layers,
    check_mlp,
    check_sequence,
    check_virtual,
    check_world,
    ranks_per_replica,
)
from megatron_ds.rules_model import beyond_the_ring, check_context, check_decoder_sequence, check_stacks
from megatron_ds.rules_recompute import check_distribution
from megatron_ds.ways import NO_WAYS, Ways, divisors, either

LAYOUT_CHECKS: tuple[Callable[[Config, int, Ways], Iterator[ConfigError]], ...] = (
    check_world,
    check_heads,
    check_mlp,
    check_layers,
    check_stacks,
    check_context,
    check_sequence,
    check_decoder_sequence,
    check_virtual,
    check_distribution,
    check_batch,
)
"""Every rule that a change of layout may break or mend; the batch's comes last."""


class Layout(NamedTuple):
    """The flags that the search may change; from the schedule on it only leaves them out."""

    tensor_model_parallel_size: int
    context_parallel_size: int
    ds_sequence_parallel_size: int
    pipeline_model_parallel_size: int
    sequence_parallel: bool
    num_layers_per_virtual_pipeline_stage: int | None
    num_virtual_stages_per_pipeline_rank: int | None
    pipeline_schedule: str | None
    pipeline_model_parallel_split_rank: int | None
    decoder_first_pipeline_num_layers: int | None
    decoder_last_pipeline_num_layers: int | None
    pp_partition_method: str | None


def find_ways(config: Config, world_size: int) -> Ways:
    """What rules may propose for a configuration that breaks some of them."""
    fits = world_size % ranks_per_replica(config.parallel) == 0
    return Ways(either(*nearest_layouts(config, world_size)), "" if fits else _nearest_world(config, world_size))


def is_legal(config: Config, world_size: int, with_batch: bool = True) -> bool:
    """Whether no rule about the layout is broken."""
    checks = LAYOUT_CHECKS if with_batch else LAYOUT_CHECKS[:-1]
    return not any(True for check in checks for _ in check(config, world_size, NO_WAYS))


def nearest_layouts(config: Config, world_size: int, most: int = 3) -> list[str]:
    """Legal layouts on as many ranks, the nearest first, as the flags that change.

    Where none suits the global batch, the batch is changed too; where no batch would do, its own rules have the word.
    """
    asked = Layout(*(getattr(config.parallel, name) for name in Layout._fields))
    candidates = sorted(
        set(_candidates(asked, config, world_size)), key=lambda layout: (_distance(asked, layout), str(layout))
    )
    modes: tuple[Literal["kept", "fitted", "ignored"], ...] = ("kept", "fitted", "ignored")
    for batch in modes:
        proposals = (_proposal(config, world_size, asked, layout, batch) for layout in candidates)
        legal = list(islice(filter(None, proposals), most))
        if legal:
            return legal
    return []


def _proposal(
    config: Config, world_size: int, asked: Layout, found: Layout, batch: Literal["kept", "fitted", "ignored"]
) -> str:
    """The flags of a legal layout; nothing for others."""
    changed = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **found._asdict()))
    given, without = _flags(asked, found)
    if batch == "fitted":
        flags, training = nearest_batch(config.training, *batch_unit(changed, world_size))
        changed = dataclasses.replace(changed, training=training)
        given.append(flags)
    legal = is_legal(changed, world_size, with_batch=batch != "ignored")
    return " ".join(given + (["without", *without] if without else [])) if legal else ""


def _candidates(asked: Layout, config: Config, world_size: int) -> Iterator[Layout]:
    """Every layout on these ranks that uses no axis but tp and pp unless it was asked for."""
    layers, splits = config.model.total_layers, {asked.pipeline_model_parallel_split_rank, None}
    schedules = {asked.pipeline_schedule, None if asked.pipeline_schedule == "interleaved" else asked.pipeline_schedule}
    for tp in divisors(world_size):
        # Without tensor parallelism --sequence-parallel does nothing, so that it may stay.
        cuts = (True, False) if asked.sequence_parallel and tp > 1 else (asked.sequence_parallel,)
        for ring, ulysses in _context_sizes(asked, world_size // tp, bool(beyond_the_ring(config))):
            for pp in divisors(world_size // (tp * ring * ulysses)):
                options = product(cuts, _virtual(asked, layers // pp), schedules, splits)
                for cut, (per_chunk, per_rank), schedule, split in options:
                    even = Layout(tp, ring, ulysses, pp, cut, per_chunk, per_rank, schedule, split, None, None, None)
                    yield even
                    yield Layout(*even[:-3], *asked[-3:])


def _context_sizes(asked: Layout, ranks: int, no_ring: bool) -> Iterator[tuple[int, int]]:
    """Ring and Ulysses: what was asked for, and Ulysses where the ring cannot serve."""
    yield 1, 1
    for size in divisors(ranks)[1:]:
        if asked.context_parallel_size > 1 and not no_ring:
            yield size, 1
        if asked.ds_sequence_parallel_size > 1 or (asked.context_parallel_size > 1 and no_ring):
            yield 1, size


def _virtual(asked: Layout, layers_of_stage: int) -> Iterator[tuple[int | None, int | None]]:
    """Ways to cut a stage: as it was asked for, not at all, otherwise."""
    per_chunk, per_rank = asked.num_layers_per_virtual_pipeline_stage, asked.num_virtual_stages_per_pipeline_rank
    yield per_chunk, per_rank
    yield None, None
    if per_chunk or per_rank or asked.pipeline_schedule == "interleaved":
        for size in divisors(layers_of_stage)[1:] if layers_of_stage else ():
            yield (layers_of_stage // size, None) if per_chunk else (None, size)


def _distance(asked: Layout, found: Layout) -> float:
    """How far a layout is from what was asked for: doublings of sizes, and a little for what is left out."""
    far = sum(abs(math.log2(wanted / size)) for wanted, size in zip(_sizes(asked), _sizes(found), strict=True))
    far += 0.5 * (asked.sequence_parallel != found.sequence_parallel)
    far += 0.5 * (asked.ds_sequence_parallel_size == 1 < found.ds_sequence_parallel_size)
    for wanted, other in zip(asked[5:], found[5:], strict=True):
        if wanted != other:
            far += abs(math.log2(wanted / other)) if isinstance(wanted, int) and isinstance(other, int) else 0.75
    return far


def _sizes(layout: Layout) -> tuple[int, int, int]:
    """tp, ranks that share a sequence in either way, pp."""
    context = max(layout.context_parallel_size, layout.ds_sequence_parallel_size)
    return layout.tensor_model_parallel_size, context, layout.pipeline_model_parallel_size


def _flags(asked: Layout, found: Layout) -> tuple[list[str], list[str]]:
    """What to type, and what to leave out."""
    given, without = [], []
    for name, old, new in zip(Layout._fields, asked, found, strict=True):
        flag = f"--{name.replace('_', '-')}"
        if new != old and (new is None or new is False):
            without.append(flag)
        elif new != old:
            given.append(f"{flag} {new}")
    return given, without


def _nearest_world(config: Config, world_size: int) -> str:
    """The number of ranks nearest to those started on which this layout is legal."""
    shared, training = ranks_per_replica(config.parallel), config.training
    most = 2 * world_size // shared + 2
    if training.global_batch_size:
        most = min(most, training.global_batch_size // (training.micro_batch_size or 1) + 1)
    worlds = sorted((shared * dp for dp in range(1, most + 1)), key=lambda ranks: (abs(ranks - world_size), ranks))
    return next((f"start {ranks} ranks" for ranks in worlds if is_legal(config, ranks)), "")
