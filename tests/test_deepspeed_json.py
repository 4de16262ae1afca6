"""ds_config.json and the flags: what is taken, what is said, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import Config, parse
from megatron_ds.deepspeed_json import Merged, merge
from megatron_ds.deepspeed_keys import KNOWN, SECTIONS
from megatron_ds.errors import ConfigError, ConfigErrors
from tests.house.source import ROOT

LARGE = """
{
  "train_batch_size": 1536,
  "train_micro_batch_size_per_gpu": 1,
  "gradient_accumulation_steps": "auto",

  "bf16": {"enabled": true},

  "zero_optimization": {
    "stage": 1,
    "reduce_bucket_size": 500000000,
    "allgather_bucket_size": 500000000,
    "overlap_comm": true,
    "contiguous_gradients": true
  },

  "activation_checkpointing": {
    "partition_activations": true,
    "cpu_checkpointing": false,
    "contiguous_memory_optimization": true,
    "synchronize_checkpoint_boundary": false
  },

  "gradient_clipping": 1.0,

  "steps_per_print": 10,
  "wall_clock_breakdown": false
}
"""
LARGE_LAUNCH = """
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96 --hidden-size 12288
    --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1
    --global-batch-size 1536 --train-iters 500000 --lr 0.00012 --min-lr 1.0e-5 --lr-decay-style cosine
    --lr-warmup-fraction 0.01 --clip-grad 1.0 --bf16 --zero-stage 1 --deepspeed-activation-checkpointing
"""
SMALL = """
{
  "train_batch_size": 512,
  "train_micro_batch_size_per_gpu": 2,
  "gradient_accumulation_steps": "auto",

  "bf16": {"enabled": true},

  "zero_optimization": {
    "stage": 1,
    "reduce_bucket_size": 500000000,
    "allgather_bucket_size": 500000000
  },

  "activation_checkpointing": {
    "partition_activations": true,
    "contiguous_memory_optimization": true
  },

  "gradient_clipping": 1.0,
  "wall_clock_breakdown": false
}
"""
SMALL_LAUNCH = """
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --num-layers 48 --hidden-size 4096
    --num-attention-heads 32 --micro-batch-size 2 --global-batch-size 512 --seq-length 2048 --train-iters 500000
    --lr 1.2e-4 --clip-grad 1.0 --bf16 --zero-stage 1 --deepspeed-activation-checkpointing
"""

# A file that repeats what holds anyway, so that a test sees only what it adds.
QUIET: dict[str, Any] = {"gradient_clipping": "auto"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ds_config.json"


def merged(file: Path, content: Any, flags: str = "", world_size: int = 1, **defaults: Any) -> Merged:
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text, encoding="utf-8")
    argv = ["--deepspeed", "--deepspeed_config", str(file), *flags.split()]
    return merge(parse(argv, defaults), world_size)


def errors_of(file: Path, content: Any, flags: str = "", world_size: int = 1) -> dict[str, ConfigError]:
    with pytest.raises(ConfigErrors) as caught:
        merged(file, content, flags, world_size)
    assert all(error.subject.startswith(f"{file}: ") for error in caught.value.errors)
    return {error.subject.removeprefix(f"{file}: "): error for error in caught.value.errors}


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return {**QUIET, **value}


def differing(new: Config, old: Config) -> dict[str, Any]:
    return {
        f"{group}.{name}": value
        for group, fields in vars(new).items()
        if group != "origins"
        for name, value in vars(fields).items()
        if value != vars(vars(old)[group])[name]
    }


@pytest.mark.parametrize(
    ("text", "launch", "world_size", "steps_per_print"),
    [(LARGE, LARGE_LAUNCH, 256, True), (SMALL, SMALL_LAUNCH, 32, False)],
)
def test_the_two_launches_of_the_guide(
    file: Path, text: str, launch: str, world_size: int, steps_per_print: bool
) -> None:
    outcome = merged(file, text, launch, world_size)
    typed = parse(["--deepspeed", "--deepspeed_config", str(file), *launch.split()])
    assert differing(outcome.config, typed) == {"optimizer.reduce_bucket_size": 500_000_000}
    assert [tuple(row) for row in outcome.chosen] == [
        ("zero_optimization.reduce_bucket_size", "500000000", "not given", "500000000", "only the file says it")
    ]
    keys = {key for note in outcome.notes for key in note.split(": no effect: ")[0].split(", ")}
    wanted = {
        "activation_checkpointing.partition_activations",
        "activation_checkpointing.contiguous_memory_optimization",
    }
    assert keys == wanted | ({"steps_per_print"} if steps_per_print else set())


@pytest.mark.parametrize(("text", "world_size", "batch", "micro"), [(LARGE, 256, 1536, 1), (SMALL, 32, 512, 2)])
def test_the_files_of_the_guide_by_themselves(file: Path, text: str, world_size: int, batch: int, micro: int) -> None:
    outcome = merged(file, text, "--tensor-model-parallel-size 4", world_size)
    assert differing(outcome.config, merged(file, QUIET, "--tensor-model-parallel-size 4").config) == {
        "training.global_batch_size": batch,
        "training.micro_batch_size": micro,
        "precision.bf16": True,
        "optimizer.zero_stage": 1,
        "optimizer.reduce_bucket_size": 500_000_000,
    }
    assert {row.flag for row in outcome.chosen} == {"not given"}


def test_without_the_switch_the_file_is_not_read(file: Path) -> None:
    config = parse(["--deepspeed_config", str(file)])
    outcome = merge(config, 1)
    assert outcome.config == config
    assert len(outcome.notes) == 1 and "--deepspeed" in outcome.notes[0]
    alone = parse(["--deepspeed"])
    assert merge(alone, 1) == Merged(alone)
    assert merge(parse([]), 1) == Merged(parse([]))


def test_other_names_of_the_flags(file: Path) -> None:
    file.write_text('{"gradient_clipping": 0.5}', encoding="utf-8")
    for argv in (
        ["--deepscale", "--deepscale_config", str(file)],
        ["--deepspeed", f"--deepspeed-config={file}"],
        ["--deepspeed", "--deepscale-config", str(file)],
    ):
        assert merge(parse(argv), 1).config.optimizer.clip_grad == 0.5


# Batch: train_batch_size = micro-batch x accumulation steps x data-parallel ranks


@pytest.mark.parametrize(
    ("content", "flags", "batch", "micro"),
    [
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4}, "", 48, 3),
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 3}, "", 48, 3),
        ({"train_batch_size": 48, "gradient_accumulation_steps": 2}, "", 48, 6),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, "", 24, 3),
        ({"train_batch_size": 48}, "", 48, 12),
        ({"train_micro_batch_size_per_gpu": 3}, "", None, 3),
        ({"train_batch_size": 48}, "--micro-batch-size 6", 48, 6),
        ({"gradient_accumulation_steps": 4}, "--micro-batch-size 6", 96, 6),
        ({"gradient_accumulation_steps": 4}, "--global-batch-size 96", 96, 6),
        ({"gradient_accumulation_steps": 4}, "", None, None),
        ({"train_batch_size": "auto"}, "--global-batch-size 48 --micro-batch-size 6", 48, 6),
        ({"train_batch_size": None, "gradient_accumulation_steps": "auto"}, "--micro-batch-size 6", None, 6),
        ({"train_batch_size": "48", "train_micro_batch_size_per_gpu": 3.0}, "", 48, 3),
        ({"train_batch_size": "4.8e1"}, "", 48, 12),
        ({"train_batch_size": 48}, "--micro-batch-size 12 --global-batch-size 48", 48, 12),
    ],
)
def test_two_batch_sizes_give_the_third(
    file: Path, content: dict[str, Any], flags: str, batch: int | None, micro: int | None
) -> None:
    # 32 ranks / (tp 2 x pp 2 x cp 2) = 4 data-parallel ranks, whichever way a sequence is cut
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    for context in ("--context-parallel-size 2", "--ds-sequence-parallel-size 2"):
        training = merged(file, {**QUIET, **content}, f"{layout} {context} {flags}", 32).config.training
        assert (training.global_batch_size, training.micro_batch_size) == (batch, micro)


@pytest.mark.parametrize(
    ("content", "flags", "key", "found", "fix"),
    [
        (
            {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
            "",
            "train_batch_size",
            "48, but micro-batch 3 x 2 accumulation steps x 4 data-parallel ranks",
            '"gradient_accumulation_steps": 4, or "train_batch_size": 24',
        ),
        ({"train_batch_size": 50, "train_micro_batch_size_per_gpu": 3}, "", "train_batch_size", "micro-batch 3", "48"),
        ({"train_batch_size": 50}, "", "train_batch_size", "1 accumulation step on", '"train_batch_size": 48'),
        ({"train_batch_size": 1}, "", "train_batch_size", "4 data-parallel ranks", '"train_batch_size": 4'),
        ({"train_batch_size": 48}, "--global-batch-size 96", "train_batch_size", "--global-batch-size 96", '"auto"'),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "--micro-batch-size 4",
            "train_micro_batch_size_per_gpu",
            "2, and --micro-batch-size 4",
            '"auto"',
        ),
        (
            {"gradient_accumulation_steps": 3},
            "--global-batch-size 48 --micro-batch-size 3",
            "train_batch_size",
            "= 36",
            '"gradient_accumulation_steps": 4',
        ),
        ({"train_batch_size": 0}, "", "train_batch_size", "0", ""),
        ({"train_batch_size": 1.5}, "", "train_batch_size", "1.5", ""),
        ({"train_batch_size": True}, "", "train_batch_size", "true", ""),
        ({"train_batch_size": "many"}, "", "train_batch_size", "many", ""),
        ({"train_batch_size": [8]}, "", "train_batch_size", "[8]", ""),
        ('{"train_batch_size": 1e999}', "", "train_batch_size", "Infinity", ""),
    ],
)
def test_batch_sizes_that_cannot_be(file: Path, content: Any, flags: str, key: str, found: str, fix: str) -> None:
    content = content if isinstance(content, str) else {**QUIET, **content}
    errors = errors_of(file, content, f"--tensor-model-parallel-size 2 {flags}", 8)
    assert list(errors) == [key]
    assert found in errors[key].found
    assert fix in errors[key].fix
    assert errors[key].expected


@pytest.mark.parametrize(
    "flags",
    ["--tensor-model-parallel-size 3", "--tensor-model-parallel-size 0", "--micro-batch-size 0"],
)
def test_an_impossible_layout_is_left_to_its_own_rules(file: Path, flags: str) -> None:
    content = {**QUIET, "train_batch_size": 7, "gradient_accumulation_steps": 2}
    assert merged(file, content, flags, 8).config.training.global_batch_size == 7


@pytest.mark.parametrize(
    ("flags", "batch"),
    [
        ("--rampup-batch-size 16 16 1000", 64),
        ("--decrease-batch-size-if-needed", 64),
        ("--step-batch-size-schedule 0:16", None),
    ],
)
def test_a_batch_that_changes_has_no_fixed_number_of_steps(file: Path, flags: str, batch: int | None) -> None:
    content = {
        **QUIET,
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 7,
    }
    outcome = merged(file, content, flags, 2)
    assert outcome.config.training.global_batch_size == batch
    assert outcome.config.training.micro_batch_size == 2
    assert any("gradient_accumulation_steps: no effect" in note for note in outcome.notes)
    assert any("train_batch_size: no effect" in note for note in outcome.notes) is (batch is None)


# Keys that act


@pytest.mark.parametrize("value", [500000000, 5e8, "5e8", "500000000", "5E+8"])
def test_whole_numbers_in_every_spelling(file: Path, value: Any) -> None:
    size = merged(file, nested("zero_optimization.reduce_bucket_size", value)).config.optimizer.reduce_bucket_size
    assert size == 500_000_000 and type(size) is int


@pytest.mark.parametrize(
    ("key", "value", "flags", "expected"),
    [
        ("zero_optimization.stage", 1, "", {"optimizer.zero_stage": 1}),
        ("zero_optimization.stage", 2, "", {"optimizer.zero_stage": 2}),
        ("zero_optimization.stage", "2", "--zero-stage 2", {}),
        ("zero_optimization.stage", 1, "--use-distributed-optimizer", {}),
        ("zero_optimization.stage", 0, "", {}),
        ("zero_optimization.stage", "auto", "--zero-stage 2", {}),
        ("zero_optimization", True, "", {"optimizer.zero_stage": 1}),
        ("zero_optimization", False, "", {}),
        ("zero_optimization", "auto", "--zero-stage 2", {}),
        ("zero_optimization", None, "", {}),
        ("zero_optimization.overlap_comm", False, "", {"optimizer.overlap_grad_reduce": False}),
        ("zero_optimization.overlap_comm", "false", "", {"optimizer.overlap_grad_reduce": False}),
        ("zero_optimization.overlap_comm", True, "", {}),
        ("zero_optimization.overlap_comm", None, "", {}),
        ("zero_optimization.offload_optimizer", {"device": "none", "pin_memory": True}, "", {}),
        ("zero_optimization.offload_optimizer", {"pin_memory": True}, "", {}),
        ("zero_optimization.cpu_offload", False, "", {}),
        ("bf16.enabled", True, "", {"precision.bf16": True}),
        ("bfloat16.enabled", True, "", {"precision.bf16": True}),
        ("bf16.enabled", "auto", "--bf16", {}),
        ("bf16", "auto", "--bf16", {}),
        ("fp16.enabled", False, "--bf16", {}),
        ("data_types.grad_accum_dtype", "bf16", "", {"precision.grad_reduce_in_bf16": True}),
        ("data_types.grad_accum_dtype", "torch.bfloat16", "", {"precision.grad_reduce_in_bf16": True}),
        ("data_types.grad_accum_dtype", "fp32", "", {}),
        ("data_types.grad_accum_dtype", None, "", {}),
        ("gradient_clipping", 0.25, "", {"optimizer.clip_grad": 0.25}),
        ("gradient_clipping", 0, "", {"optimizer.clip_grad": 0.0}),
        ("gradient_clipping", 1, "", {}),
        ("wall_clock_breakdown", True, "", {"logging.timing_log_level": 2}),
        ("wall_clock_breakdown", False, "--timing-log-level 1", {}),
        (
            "activation_checkpointing.partition_activations",
            True,
            "--checkpoint-activations --tensor-model-parallel-size 2",
            {"recompute.distribute_saved_activations": True},
        ),
        ("activation_checkpointing.partition_activations", True, "--recompute-granularity full", {}),
        (
            "activation_checkpointing.cpu_checkpointing",
            True,
            "--recompute-granularity full",
            {"recompute.checkpoint_in_cpu": True},
        ),
        ("activation_checkpointing.cpu_checkpointing", True, "--recompute-activations", {}),
        ("optimizer.params.lr", 3e-4, "", {"optimizer.lr": 3e-4}),
        ("optimizer.params.lr", "auto", "--lr 1e-3", {}),
        ("optimizer.params.betas", [0.8, "0.95"], "", {"optimizer.adam_beta1": 0.8, "optimizer.adam_beta2": 0.95}),
        ("optimizer.params.eps", 1e-6, "", {"optimizer.adam_eps": 1e-6}),
        ("optimizer.params.weight_decay", "1e-1", "", {"optimizer.weight_decay": 0.1}),
        ("optimizer.params.max_grad_norm", 0, "", {}),
        ("optimizer.type", "AdamW", "", {}),
        ("optimizer.type", "Adam", "", {}),
    ],
)
def test_keys_that_act(file: Path, key: str, value: Any, flags: str, expected: dict[str, Any]) -> None:
    outcome = merged(file, nested(key, value), flags)
    assert differing(outcome.config, merged(file, QUIET, flags).config) == expected


def test_the_flags_that_nobody_typed_yield_even_if_the_recipe_prefers_them(file: Path) -> None:
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
    }
    recipe = {"micro_batch_size": 4, "use_distributed_optimizer": True, "fp16": True, "clip_grad": 2.0}
    config = merged(file, content, **recipe).config
    assert config.training.micro_batch_size == 8
    assert (config.optimizer.effective_zero_stage, config.optimizer.use_distributed_optimizer) == (0, False)
    assert (config.precision.bf16, config.precision.fp16) == (True, False)
    assert config.optimizer.clip_grad == 0.5


@pytest.mark.parametrize(
    ("section", "flags", "expected"),
    [
        # (loss_scale, initial, window, hysteresis, minimum): DeepSpeed's defaults once one of the dynamic keys is there
        ({"enabled": True, "loss_scale": 0, "initial_scale_power": 11}, "", (None, 2048.0, 1000, 2, 1.0)),
        ({"enabled": True, "loss_scale_window": 500}, "--fp16", (None, 65536.0, 500, 2, 1.0)),
        ({"enabled": True, "hysteresis": "4", "min_loss_scale": 0.5}, "", (None, 65536.0, 1000, 4, 0.5)),
        # none of them: 2^32 and no hysteresis
        ({"enabled": True}, "", (None, 4294967296.0, 1000, 1, 1.0)),
        ({"enabled": True, "loss_scale": 128}, "", (128.0, 4294967296.0, 1000, 1, 1.0)),
        # flags fill in what the file leaves out, and yield where it speaks
        ({"enabled": True}, "--hysteresis 3 --loss-scale 12", (12.0, 4294967296.0, 1000, 3, 1.0)),
        ({"enabled": True, "loss_scale": 0, "hysteresis": 2}, "--loss-scale 12", (None, 65536.0, 1000, 2, 1.0)),
        ({"enabled": True, "initial_scale_power": "auto"}, "--initial-loss-scale 8", (None, 8.0, 1000, 2, 1.0)),
        ({"enabled": "auto", "hysteresis": 2}, "--fp16", (None, 65536.0, 1000, 2, 1.0)),
    ],
)
def test_loss_scaling_is_deepspeeds(file: Path, section: dict[str, Any], flags: str, expected: tuple[Any, ...]) -> None:
    precision = merged(file, {**QUIET, "fp16": section}, flags).config.precision
    assert precision.fp16 and precision.deepspeed_loss_scaling
    scale = (precision.loss_scale, precision.initial_loss_scale, precision.loss_scale_window)
    assert (*scale, precision.hysteresis, precision.min_loss_scale) == expected


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ({}, "--fp16"),
        ({"fp16": "auto"}, "--fp16"),
        ({"fp16": {"enabled": False, "hysteresis": 1}}, ""),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False, "initial_scale_power": 11}}, ""),
    ],
)
def test_loss_scaling_stays_megatrons_without_fp16_in_the_file(file: Path, content: dict[str, Any], flags: str) -> None:
    precision = merged(file, {**QUIET, **content}, flags).config.precision
    assert not precision.deepspeed_loss_scaling
    assert (precision.initial_loss_scale, precision.hysteresis) == (4294967296.0, 2)


# What is said


def test_the_table_of_disagreements(file: Path) -> None:
    content = {
        "gradient_clipping": 0.5,
        "zero_optimization": {"reduce_bucket_size": 2e8, "overlap_comm": True, "allgather_bucket_size": 2e8},
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "activation_checkpointing": {"partition_activations": False},
        "wall_clock_breakdown": True,
    }
    flags = (
        "--clip-grad 1.0 --ddp-bucket-size 1000 --no-overlap-grad-reduce --fp16 --loss-scale 12 --lr 2e-3"
        " --adam-beta2 0.95 --partition-activations --timing-log-level 0"
    )
    outcome = merged(file, content, flags)
    rows = {row.key: row[1:4] for row in outcome.chosen if row.flag != "not given"}
    assert rows == {
        "gradient_clipping": ("0.5", "--clip-grad 1", "0.5"),
        "zero_optimization.reduce_bucket_size": ("200000000", "--reduce-bucket-size 1000", "200000000"),
        "zero_optimization.overlap_comm": ("true", "--no-overlap-grad-reduce", "true"),
        "fp16.loss_scale": ("0", "--loss-scale 12", "dynamic"),
        "optimizer.params.lr": ("0.001", "--lr 0.002", "0.002"),
        "activation_checkpointing.partition_activations": ("false", "--distribute-saved-activations", "true"),
        "wall_clock_breakdown": ("true", "--timing-log-level 0", "2"),
    }
    assert all(row.why for row in outcome.chosen)
    config = outcome.config
    assert (config.optimizer.clip_grad, config.optimizer.reduce_bucket_size) == (0.5, 200_000_000)
    assert (config.optimizer.overlap_grad_reduce, config.optimizer.lr) == (True, 2e-3)
    assert (config.precision.loss_scale, config.recompute.distribute_saved_activations) == (None, True)
    lines = outcome.table().splitlines()
    assert lines[0] == "ds_config.json and flags:"
    assert lines[1].split() == ["key", "file", "flag", "chosen", "why"]
    assert len(lines) == 2 + len(outcome.chosen)
    columns = {line.index(row.why) for line, row in zip(lines[2:], outcome.chosen, strict=True)}
    assert len(columns) == 1  # aligned


def test_megatrons_overlap_flag_and_the_file(file: Path) -> None:
    outcome = merged(file, nested("zero_optimization.overlap_comm", False), "--overlap-grad-reduce")
    assert not outcome.config.optimizer.overlap_grad_reduce
    assert [row[:4] for row in outcome.chosen] == [
        ("zero_optimization.overlap_comm", "false", "--overlap-grad-reduce", "false")
    ]


def test_a_derived_batch_size_says_how(file: Path) -> None:
    outcome = merged(file, {**QUIET, "train_batch_size": 48, "gradient_accumulation_steps": 2}, "", 4)
    row = next(row for row in outcome.chosen if row.key == "train_micro_batch_size_per_gpu")
    assert (row.file, row.flag, row.chosen) == ("not given", "not given", "6")
    assert "48 / 2 accumulation steps / 4 data-parallel ranks" in row.why


def test_agreement_is_silent(file: Path) -> None:
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "reduce_scatter": True},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "communication_data_type": "fp32",
        "wall_clock_breakdown": False,
        "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen", "min_difficulty": 72},
        "tensorboard": {"enabled": False},
        "checkpoint": {"load_universal": False},
        "elasticity": {"enabled": False, "version": 0.2},
        "data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}},
        "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False, "schedule": 1}}},
    }
    outcome = merged(file, content, "--global-batch-size 8 --micro-batch-size 4 --zero-stage 2 --bf16", 2)
    assert (outcome.chosen, outcome.notes, outcome.table()) == ((), (), "")


def test_without_a_limit_in_the_file_clip_grad_holds_and_it_is_said(file: Path) -> None:
    for content in ({}, {"gradient_clipping": None}):
        outcome = merged(file, content, "--clip-grad 0.7")
        assert outcome.config.optimizer.clip_grad == 0.7
        assert len(outcome.notes) == 1 and "--clip-grad 0.7" in outcome.notes[0]
    assert merged(file, {}, "--clip-grad 0").notes == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps_per_print", 10),
        ("prescale_gradients", True),
        ("gradient_predivide_factor", 2.0),
        ("zero_allow_untested_optimizer", True),
        ("zero_optimization.contiguous_gradients", False),
        ("zero_optimization.elastic_checkpoint", True),
        ("zero_optimization.allgather_bucket_size", 5e8),
        ("zero_optimization.stage3_prefetch_bucket_size", 5e7),
        ("activation_checkpointing.number_checkpoints", 4),
        ("activation_checkpointing.partition_activations", True),
        ("activation_checkpointing.profile", True),
        ("communication_data_type", "bfp16"),
        ("checkpoint.load_universal", True),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),
        ("flops_profiler", {"enabled": True, "profile_step": 1}),
        ("tensorboard", {"enabled": True, "output_path": "x"}),
        ("aio", {"block_size": 1}),
        ("autotuning", {"enabled": True}),
    ],
)
def test_what_has_no_effect_is_said_once(file: Path, key: str, value: Any) -> None:
    outcome = merged(file, nested(key, value))
    assert outcome.config == merged(file, QUIET).config
    assert len(outcome.notes) == 1
    assert outcome.notes[0].startswith(f"{key}: no effect: ")


def test_keys_with_one_reason_share_a_line(file: Path) -> None:
    section = {"stage3_max_live_parameters": 3e9, "stage3_max_reuse_distance": "3e9", "sub_group_size": 1e9}
    (note,) = merged(file, {**QUIET, "zero_optimization": section}).notes
    assert all(f"zero_optimization.{key}" in note for key in section)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train_batchsize", "train_batch_size"),
        ("Gradient_Clipping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimization.reduce_bucketsize", "zero_optimization.reduce_bucket_size"),
        ("fp16.enable", "fp16.enabled"),
        ("overlap_comm", "zero_optimization.overlap_comm"),
        ("zero_optimization.partition_activations", "activation_checkpointing.partition_activations"),
        ("optimizer.params.weightdecay", "optimizer.params.weight_decay"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(file: Path, key: str, nearest: str) -> None:
    outcome = merged(file, nested(key, 1))
    assert outcome.config == merged(file, QUIET).config
    assert outcome.notes == (f"{key}: nobody reads this key; did you mean {nearest}?",)


def test_an_unknown_key_like_no_other(file: Path) -> None:
    assert merged(file, {**QUIET, "qqq": {"x": 1}}).notes == ("qqq: nobody reads this key",)


# What is refused


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("zero_optimization.stage", 3, '"stage": 2'),
        ("zero_optimization.stage", "3", '"stage": 2'),
        ("zero_optimization.stage", -1, '"stage": 2'),
        ("zero_optimization.offload_optimizer", {"device": "cpu", "pin_memory": True}, '"device": "none"'),
        ("zero_optimization.offload_param", {"device": "nvme"}, '"device": "none"'),
        ("zero_optimization.cpu_offload", True, "false"),
        ("fp16.fp16_master_weights_and_grads", True, "false"),
        ("fp16.consecutive_hysteresis", True, "false"),
        ("amp", {"enabled": True, "opt_level": "O1"}, "bf16"),
        ("curriculum_learning", {"enabled": True, "curriculum_type": "seqlen"}, '"enabled": false'),
        ("data_efficiency", {"enabled": True}, '"enabled": false'),
        ("progressive_layer_drop", {"enabled": True, "theta": 0.5}, '"enabled": false'),
        ("sparse_attention", {"mode": "fixed", "block": 16}, "leave it out"),
        ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": True}}}, "leave it out"),
        ("elasticity", {"enabled": True, "max_train_batch_size": 2000}, "train_batch_size"),
        ("data_types.grad_accum_dtype", "fp16", ""),
        ("data_types.grad_accum_dtype", "int8", ""),
        ("communication_data_type", "fp8", ""),
        ("optimizer.type", "OneBitAdam", "AdamW"),
        ("optimizer.type", "Lamb", "AdamW"),
        ("optimizer.params.max_grad_norm", 1.0, '"gradient_clipping": 1'),
        ("optimizer.params.betas", 0.9, ""),
        ("optimizer.params.betas", [0.9], ""),
        ("optimizer.params.bias_correction", False, "leave it out"),
        ("optimizer.params.adam_w_mode", False, "leave it out"),
        ("gradient_clipping", -1, ""),
        ("gradient_clipping", "much", ""),
        ("fp16.initial_scale_power", 128, ""),
        ("fp16.hysteresis", 0, ""),
        ("fp16.enabled", 1, ""),
        ("bf16", True, ""),
        ("zero_optimization", 2, ""),
        ("zero_optimization.reduce_bucket_size", 0, ""),
        ("zero_optimization.reduce_bucket_size", "5e8.5", ""),
        ("zero_optimization.overlap_comm", "yes", ""),
    ],
)
def test_what_is_refused(file: Path, key: str, value: Any, fix: str) -> None:
    errors = errors_of(file, nested(key, value))
    assert list(errors) == [key]
    assert errors[key].found and errors[key].expected
    assert fix in errors[key].fix


def test_one_bit_adam_gets_a_sentence(file: Path) -> None:
    error = errors_of(file, nested("optimizer.type", "OneBitAdam"))["optimizer.type"]
    assert error.found == "OneBitAdam"
    assert "compressed gradients" in error.expected


@pytest.mark.parametrize(
    ("key", "value", "flags", "found"),
    [
        ("zero_optimization.stage", 1, "--zero-stage 2", "1, and --zero-stage 2 on the command line"),
        ("zero_optimization.stage", 0, "--zero-stage 1", "0, and --zero-stage 1 on the command line"),
        ("zero_optimization.stage", 2, "--use-distributed-optimizer", "2, and --use-distributed-optimizer"),
        ("bf16.enabled", True, "--fp16", "true, and --fp16 on the command line"),
        ("fp16.enabled", True, "--bf16", "true, and --bf16 on the command line"),
        ("bf16.enabled", False, "--bf16", "false, and --bf16 on the command line"),
        ("bfloat16.enabled", False, "--bf16", "false, and --bf16 on the command line"),
        ("fp16.enabled", False, "--fp16", "false, and --fp16 on the command line"),
        ("data_types.grad_accum_dtype", "fp32", "--grad-reduce-in-bf16", "fp32, and --grad-reduce-in-bf16"),
    ],
)
def test_a_typed_flag_that_says_otherwise(file: Path, key: str, value: Any, flags: str, found: str) -> None:
    errors = errors_of(file, nested(key, value), flags)
    (error,) = errors.values()
    assert found in error.found
    assert error.fix


def test_both_half_precisions(file: Path) -> None:
    (error,) = errors_of(file, {**QUIET, "fp16": {"enabled": True}, "bf16": {"enabled": True}}).values()
    assert error.found == "both"


def test_all_contradictions_are_told_at_once(file: Path) -> None:
    content = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "gradient_clipping": "x",
    }
    errors = errors_of(file, content, "--global-batch-size 16 --fp16")
    assert set(errors) == {
        "train_batch_size",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer",
        "bf16.enabled",
        "gradient_clipping",
    }


# The file itself


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ('{"fp16": {"enabled": true, "enabled": false}}', "key 'enabled' twice"),
        ('{\n  "train_batch_size": GBSIZE\n}', "line 2: '\"train_batch_size\": GBSIZE'"),
        ('{\n  // the batch\n  "train_batch_size": 8}', "line 2: '// the batch'"),
        ('{"train_batch_size": 8,}', "line 1"),
        ("", "line 1"),
        ('{"gradient_clipping": NaN}', "NaN"),
        ("[1]", "a list"),
        ("3", "a int"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_is_no_ds_config(file: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(file, text)
    assert caught.value.subject == str(file)
    assert found in caught.value.found
    assert caught.value.expected and caught.value.fix


def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b'{"train_batch_size": "\xff"}')
    for path, found in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory"), (file, "UTF-8")):
        with pytest.raises(ConfigError) as caught:
            merge(parse(["--deepspeed", f"--deepspeed_config={path}"]), 1)
        assert caught.value.subject == f"--deepspeed_config {path}"
        assert found in caught.value.found
        assert caught.value.exit_code == 2


# The page


def test_the_page_has_a_row_for_every_key() -> None:
    page = (ROOT / "docs/ds_config.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert named == KNOWN
    assert not KNOWN & SECTIONS
