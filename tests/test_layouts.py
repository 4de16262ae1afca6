"""The layouts that messages propose, fed back by the hundred."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from megatron_ds.config import Config
from megatron_ds.errors import ConfigError, ConfigErrors
from megatron_ds.layouts import nearest_layouts
from megatron_ds.rules import check_config
from tests.helpers.recipe import Value
from tests.test_rules import config, ways_out

BASE_CONFIG = config({})


def errors(world_size: int, flags: dict[str, Value]) -> tuple[ConfigError, ...]:
    try:
        check_config(applied(flags), world_size)
    except ConfigErrors as caught:
        return tuple(error for error in caught.errors if isinstance(error, ConfigError))
    return ()


def applied(flags: dict[str, Value]) -> Config:
    """The configuration with these flags, without a parser, which would take most of the time."""
    groups: dict[str, Any] = {}
    for group in ("model", "parallel", "training", "data"):
        known = {field.name: field for field in dataclasses.fields(getattr(BASE_CONFIG, group))}
        values = {name: typed(name, value) for name, value in flags.items() if name in known}
        values = {name: known[name].default if value is None else value for name, value in values.items()}
        groups[group] = dataclasses.replace(getattr(BASE_CONFIG, group), **values)
    return dataclasses.replace(BASE_CONFIG, **groups)


def typed(name: str, value: Value) -> Any:
    if name == "rampup_batch_size" and isinstance(value, str):
        return tuple(map(int, value.split()))
    return int(value) if isinstance(value, str) and value.isdigit() else value


def test_flags_are_applied_as_the_parser_would() -> None:
    draw = random.Random(3)
    for _ in range(10):
        _, flags = random_case(draw)
        assert applied(flags) == config(flags)


def random_model(draw: random.Random) -> dict[str, Value]:
    """What makes a model other than a plain GPT."""
    kind = draw.choice(["GPT", "GPT", "GPT", "alibi", "window", "BERT", "T5", "T5"])
    if kind == "T5":
        flags: dict[str, Value] = {"model_type": "T5", "decoder_seq_length": draw.choice([16, 30, 64])}
        flags |= {"decoder_num_layers": draw.choice([None, 2, 9]), "num_key_value_heads": None}
        flags |= {"pp_partition_method": None, "decoder_first_pipeline_num_layers": None}
        return flags | {"pipeline_model_parallel_split_rank": draw.choice([None, None, 1, 2])}
    others: dict[str, dict[str, Value]] = {
        "GPT": {},
        "alibi": {"position_embedding_type": "alibi"},
        "window": {"window_size": 7},
        "BERT": {"model_type": "BERT"},
    }
    return others[kind]


def random_case(draw: random.Random) -> tuple[int, dict[str, Value]]:
    """Ranks and flags of a layout, most of them impossible."""
    heads = draw.choice([6, 8, 12, 25])
    flags: dict[str, Value] = {
        "num_layers": draw.choice([7, 8, 12, 24]),
        "num_attention_heads": heads,
        "hidden_size": 64 * heads,
        "num_key_value_heads": draw.choice([None, None, 2 if heads % 2 == 0 else 5]),
        "seq_length": draw.choice([96, 100, 128, 1024]),
        "micro_batch_size": draw.choice([1, 2, 4]),
        "global_batch_size": draw.choice([None, 8, 12, 32, 120]),
        "tensor_model_parallel_size": draw.choice([1, 1, 2, 3, 4, 8]),
        "pipeline_model_parallel_size": draw.choice([1, 1, 2, 3, 4]),
        "context_parallel_size": draw.choice([1, 1, 1, 2, 3, 4]),
        "ds_sequence_parallel_size": draw.choice([1, 1, 1, 1, 2, 4]),
        "sequence_parallel": draw.random() < 0.3,
        "num_virtual_stages_per_pipeline_rank": draw.choice([None, None, None, 2, 3]),
        "num_layers_per_virtual_pipeline_stage": draw.choice([None, None, None, None, 1, 2]),
        "pipeline_schedule": draw.choice([None, None, None, "gpipe", "interleaved"]),
        "pp_partition_method": draw.choice([None, None, None, None, "uniform"]),
        "decoder_first_pipeline_num_layers": draw.choice([None, None, None, None, 2]),
    }
    if draw.random() < 0.2:
        flags |= {"train_iters": None, "train_samples": 5000, "rampup_batch_size": "8 8 100"}
    if draw.random() < 0.1:
        flags |= {"train_iters": None, "train_samples": 5000, "step_batch_size_schedule": "0:8 9K:24"}
        flags |= {"global_batch_size": None, "rampup_batch_size": None}
    if flags["pp_partition_method"]:
        flags["decoder_first_pipeline_num_layers"] = None
    flags |= random_model(draw)
    return draw.choice([1, 2, 4, 6, 8, 12, 16]), flags


LAYOUT_FLAGS = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "ds_sequence_parallel_size",
    "sequence_parallel", "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
}  # fmt: skip


def test_whatever_is_proposed_is_legal() -> None:
    draw, broken, layouts, others = random.Random(1), 0, 0, 0
    for _ in range(200):
        world_size, flags = random_case(draw)
        found = errors(world_size, flags)
        broken += bool(found)
        for error in found:
            for changes, ranks in ways_out(error.fix, world_size):
                left = errors(ranks, flags | changes)
                if changes.keys() & LAYOUT_FLAGS or not changes or None in changes.values():
                    layouts += 1
                    assert not left, (world_size, flags, changes)
                else:
                    others += 1
                    told = {(each.subject, each.expected) for each in left}
                    assert (error.subject, error.expected) not in told, (world_size, flags, changes)
    assert (broken > 140, layouts > 250, others > 100) == (True, True, True), (broken, layouts, others)


def test_every_impossible_layout_has_a_way_out() -> None:
    draw = random.Random(2)
    for _ in range(150):
        world_size, flags = random_case(draw)
        assert not [error for error in errors(world_size, flags) if not error.fix], (world_size, flags)


def test_nearest_layouts_first() -> None:
    def nearest(world_size: int, **flags: Value) -> list[str]:
        return nearest_layouts(config(flags), world_size)

    tp, pp = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
    assert nearest(6, tensor_model_parallel_size=4) == [f"{tp} 3", f"{tp} 6", f"{tp} 2"]
    assert nearest(8, pipeline_model_parallel_size=3)[:2] == [f"{pp} 4", f"{pp} 2"]
    # Heads in groups of four leave tp = 4 only; the batch then decides.
    assert nearest(8, tensor_model_parallel_size=8, num_key_value_heads=4, global_batch_size=8)[0] == f"{tp} 4"
    # Where no layout suits the batch it is told with the layout.
    assert nearest(6, tensor_model_parallel_size=4, global_batch_size=7)[0] == f"{tp} 3 --global-batch-size 8"
    # Sequences stay shared where they can be; --sequence-parallel is given up last.
    first = nearest(8, context_parallel_size=3, tensor_model_parallel_size=2, sequence_parallel=True)
    assert first[:2] == ["--context-parallel-size 4", "--context-parallel-size 2"]
    both = nearest(4, ds_sequence_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert both[0] == "without --sequence-parallel"


def test_a_model_beyond_the_ring_is_led_to_ulysses() -> None:
    def nearest(world_size: int, **flags: Value) -> list[str]:
        return nearest_layouts(config(flags), world_size)

    alibi = nearest(2, context_parallel_size=2, position_embedding_type="alibi")
    assert alibi[0] == "--context-parallel-size 1 --ds-sequence-parallel-size 2"
    assert nearest(2, context_parallel_size=2, model_type="BERT")[0] == alibi[0]
    t5 = nearest(4, context_parallel_size=2, model_type="T5", decoder_seq_length=128)
    assert t5[0] == "--context-parallel-size 1"
    assert not any("sequence-parallel-size" in way for way in t5)


def test_a_split_that_does_not_fit_is_left_out() -> None:
    flags: dict[str, Value] = {"model_type": "T5", "decoder_seq_length": 128, "pipeline_model_parallel_size": 4}
    (error,) = errors(4, flags | {"pipeline_model_parallel_split_rank": 1, "decoder_num_layers": 2})
    assert error.fix.startswith("without --pipeline-model-parallel-split-rank, or ")
    assert error.fix.endswith(", or --pipeline-model-parallel-split-rank 2")


def test_several_errors_name_the_layouts_once() -> None:
    found = errors(8, {"context_parallel_size": 3})
    assert [error.subject.split()[0] for error in found] == ["--tensor-model-parallel-size", "--seq-length"]
    assert found[0].fix.startswith("--context-parallel-size 4, or --context-parallel-size 2, or ")
    assert found[1].fix == "a layout named above, or --seq-length 1026"


def test_a_large_machine_is_searched_in_no_time() -> None:
    flags: dict[str, Value] = {"num_layers": 96, "hidden_size": 12288, "num_attention_heads": 96, "micro_batch_size": 1}
    flags |= {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 20, "global_batch_size": 1920}
    (layers,) = errors(1920, flags)
    assert layers.subject == "--num-layers"
    assert layers.fix.startswith("--pipeline-model-parallel-size 24, or --pipeline-model-parallel-size 16, or ")
