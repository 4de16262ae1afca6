"""What ds_config.json may hold: how it is read, and for every key what kind of value it has and whether it acts here.

docs/ds_config.md explains the keys one by one; deepspeed_json.py puts those that act into the configuration.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_ds.errors import ConfigError


def read(file: str) -> dict[str, Any]:
    """The file's object.

    Raises: ConfigError if it cannot be read, is no JSON, has a key twice, or holds something else than an object
    """
    try:
        with open(file, encoding="utf-8-sig") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--deepspeed_config {file}", str(why), "a readable JSON file", "check the path") from None
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        lines = text.split("\n")
        found = f"line {error.lineno}: {lines[error.lineno - 1].strip()[:80]!a} ({error.msg})"
        raise ConfigError(file, found, "JSON", "no comments, no comma after the last item") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(file, str(error), "JSON, every key once", "leave one of them") from None
    if not isinstance(content, dict):
        raise ConfigError(file, f"a {type(content).__name__}", "an object", '{"train_batch_size": 8}')
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!a} twice in one object")
        seen[key] = value
    return seen


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is not a number of JSON")


def number(value: Any) -> float:
    """A number, also as a string.

    Raises: ValueError with what was expected
    """
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError("a number")
    return result


def whole(value: Any) -> int:
    """A whole number, also as a float or a string: 8, 5e8, "5e8".

    Raises: ValueError with what was expected
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    result = number(value)
    if not result.is_integer():
        raise ValueError("a whole number")
    return int(result)


def switch(value: Any) -> bool:
    """True or false, also as a string.

    Raises: ValueError with what was expected
    """
    found = {"true": True, "false": False}.get(str(value).lower()) if isinstance(value, bool | str) else None
    if found is None:
        raise ValueError("true or false")
    return found


def text(value: Any) -> str:
    """A string.

    Raises: ValueError with what was expected
    """
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def positive(value: Any) -> int:
    """A whole number of at least 1.

    Raises: ValueError with what was expected
    """
    if whole(value) < 1:
        raise ValueError("a whole number of at least 1")
    return whole(value)


def not_negative(value: Any) -> float:
    """A number of at least 0.

    Raises: ValueError with what was expected
    """
    if number(value) < 0:
        raise ValueError("a number of at least 0")
    return number(value)


def power_of_two(value: Any) -> float:
    """The exponent's power.

    Raises: ValueError with what was expected
    """
    if not 0 <= whole(value) <= 127:
        raise ValueError("a whole number from 0 to 127, the exponent of 2")
    return 2.0 ** whole(value)


def constant_scale(value: Any) -> float | None:
    """A loss scale; 0, which asks for the dynamic one, is None.

    Raises: ValueError with what was expected
    """
    return not_negative(value) or None


def two_numbers(value: Any) -> tuple[float, float]:
    """Adam's betas.

    Raises: ValueError with what was expected
    """
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("two numbers: [0.9, 0.95]")
    return number(value[0]), number(value[1])


DTYPES = {
    name: short
    for short, names in {
        "fp32": ("fp32", "float32", "float"),
        "bf16": ("bf16", "bfp16", "bfloat16"),
        "fp16": ("fp16", "float16", "half"),
    }.items()
    for name in names
}


def dtype(value: Any) -> str:
    """fp32, bf16 or fp16, under any name that DeepSpeed knows.

    Raises: ValueError with what was expected
    """
    found = DTYPES.get(text(value).lower().removeprefix("torch."))
    if found is None:
        raise ValueError("fp32 or bf16")
    return found


def sums_in_bf16(value: Any) -> bool:
    """The type in which gradients are summed.

    Raises: ValueError with what was expected
    """
    if dtype(value) == "fp16":
        raise ValueError("fp32 or bf16: sums in fp16 overflow")
    return dtype(value) == "bf16"


def offloads(value: Any) -> bool:
    """Whether a section of offloading names a device.

    Raises: ValueError with what was expected
    """
    if not isinstance(value, dict):
        raise ValueError("an object: {...}")
    return value.get("device") not in (None, "none", "auto")


def _in(section: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in keys.items()}


ACTING: Mapping[str, Callable[[Any], Any]] = {
    "train_batch_size": positive,
    "train_micro_batch_size_per_gpu": positive,
    "gradient_accumulation_steps": positive,
    "gradient_clipping": not_negative,
    "communication_data_type": dtype,
    "wall_clock_breakdown": switch,
    "data_types.grad_accum_dtype": sums_in_bf16,
    **_in(
        "zero_optimization",
        {
            "stage": whole,
            "reduce_bucket_size": positive,
            "allgather_bucket_size": positive,
            "overlap_comm": switch,
            "offload_optimizer": offloads,
            "offload_param": offloads,
            "cpu_offload": switch,
            "cpu_offload_param": switch,
        },
    ),
    **_in(
        "fp16",
        {
            "enabled": switch,
            "loss_scale": constant_scale,
            "initial_scale_power": power_of_two,
            "loss_scale_window": positive,
            "hysteresis": positive,
            "consecutive_hysteresis": switch,
            "min_loss_scale": not_negative,
            "fp16_master_weights_and_grads": switch,
        },
    ),
    "bf16.enabled": switch,
    "activation_checkpointing.partition_activations": switch,
    "activation_checkpointing.cpu_checkpointing": switch,
    "optimizer.type": text,
    **_in(
        "optimizer.params",
        {
            "lr": number,
            "betas": two_numbers,
            "eps": number,
            "weight_decay": number,
            "max_grad_norm": number,
            "bias_correction": switch,
            "adam_w_mode": switch,
        },
    ),
}
"""Keys that change something here, or are checked, and how their values are read."""

_STAGE_3 = (
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_model_persistence_threshold",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zeropp_loco_param",
    "mics_shard_size",
    "mics_hierarchical_params_gather",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
)
_REPORT = "--report-costs prints memory and bytes sent"
_ALWAYS = "ZeRO always reduces into shards and gathers from them"
_ANYWHERE = "every checkpoint loads on every layout"
_OPTIMIZER = "there is one optimizer, the same on every device"

NO_EFFECT: Mapping[str, tuple[Any, str]] = {
    "steps_per_print": (None, "--log-interval says how often a line is printed"),
    "prescale_gradients": (False, "gradients are summed unscaled and scaled once"),
    "gradient_predivide_factor": (1, "gradients are summed unscaled and scaled once"),
    "sparse_gradients": (False, "gradients are dense"),
    "fp32_allreduce": (False, "gradients are reduced in fp32 unless --grad-reduce-in-bf16"),
    "disable_allgather": (False, _ALWAYS),
    "seq_parallel_communication_data_type": (None, "activations travel in the type in which they are computed"),
    "zero_allow_untested_optimizer": (None, _OPTIMIZER),
    "zero_force_ds_cpu_optimizer": (None, _OPTIMIZER),
    "scheduler": (None, "the learning rate follows the flags, --lr-decay-style and its companions"),
    "dataloader_drop_last": (None, "an iteration always is a whole batch"),
    "vocabulary_size": (None, "the tokenizer says it"),
    "memory_breakdown": (False, _REPORT),
    "comms_logger": (None, _REPORT),
    "dump_state": (False, "the arguments are always printed"),
    "flops_profiler": (None, "the log line has the throughput, --timing-log-level 2 the times"),
    "tensorboard": (None, "--tensorboard-dir says it"),
    "wandb": (None, "--wandb-project says it"),
    "csv_monitor": (None, "--metrics-file writes every iteration"),
    "comet": (None, "--metrics-file writes every iteration"),
    "aio": (None, "nothing is offloaded"),
    "eigenvalue": (None, "not supported"),
    "autotuning": (None, "not supported; --dry-run shows what a layout costs"),
    "nebula": (None, "not supported"),
    "graph_harvesting": (False, "not supported"),
    "hybrid_engine": (None, "not supported"),
    **_in(
        "zero_optimization",
        {
            "contiguous_gradients": (True, "gradients always live in buckets"),
            "reduce_scatter": (True, _ALWAYS),
            "allgather_partitions": (True, _ALWAYS),
            "use_multi_rank_bucket_allreduce": (True, _ALWAYS),
            "round_robin_gradients": (False, "nothing is offloaded"),
            "cpu_offload_use_pin_memory": (False, "nothing is offloaded"),
            "ignore_unused_parameters": (True, "every parameter is used"),
            "load_from_fp32_weights": (True, "fp32 weights are loaded where a checkpoint has them"),
            "elastic_checkpoint": (False, _ANYWHERE),
            "legacy_stage1": (False, "there is one stage 1"),
        },
    ),
    **{f"zero_optimization.{key}": (None, "it acts at ZeRO stage 3 only") for key in _STAGE_3},
    "fp16.auto_cast": (False, "inputs are whole numbers"),
    "bfloat16": (None, "bf16 is its new name, and that is read"),
    "bf16.immediate_grad_update": (False, "gradients are always added as soon as they exist"),
    **_in(
        "activation_checkpointing",
        {
            "contiguous_memory_optimization": (False, "the allocator decides where kept inputs lie"),
            "number_checkpoints": (None, "--recompute-num-layers says it"),
            "synchronize_checkpoint_boundary": (False, "nothing waits for it"),
            "profile": (False, "--timing-log-level 2 times forward and backward"),
        },
    ),
    "checkpoint.load_universal": (False, _ANYWHERE),
    "checkpoint.tag_validation": (None, "ranks always agree on the checkpoint"),
    "checkpoint.use_node_local_storage": (False, "--save says where"),
    "checkpoint.parallel_write": (None, "every rank writes its share"),
    "pipeline": (None, "--pp-partition-method and the recompute flags say it"),
    "optimizer.legacy_fusion": (False, _OPTIMIZER),
    "optimizer.params.torch_adam": (None, _OPTIMIZER),
}
"""Keys that change no result here: the value that needs no word, and the reason why any other has no effect."""

FEATURES: Mapping[str, str] = {
    "zero_optimization.offload_optimizer": '"device": "none"; ZeRO 1 and 2 share the optimizer state among ranks',
    "zero_optimization.offload_param": '"device": "none"; tensor and pipeline parallelism share the parameters',
    "zero_optimization.cpu_offload": "false; ZeRO 1 and 2 share the optimizer state among ranks",
    "zero_optimization.cpu_offload_param": "false; tensor and pipeline parallelism share the parameters",
    "fp16.consecutive_hysteresis": "false",
    "fp16.fp16_master_weights_and_grads": "false: master weights and sums stay in fp32",
    "amp": '"bf16": {"enabled": true}',
    "curriculum_learning": '"enabled": false: every sample has all of --seq-length',
    "data_efficiency": '"enabled": false: all tokens of every sample go through all layers',
    "progressive_layer_drop": '"enabled": false',
    "sparse_attention": "leave it out: attention is dense",
    "compression_training": "leave it out",
    "quantize_training": "leave it out",
    "weight_quantization": "leave it out",
    "elasticity": '"enabled": false, and "train_batch_size"',
}
"""What would change the training and is not supported, with the nearest that is."""

DYNAMIC_SCALE = ("initial_scale_power", "loss_scale_window", "min_loss_scale", "hysteresis", "consecutive_hysteresis")
KNOWN = frozenset(ACTING) | frozenset(NO_EFFECT) | frozenset(FEATURES)
SECTIONS = frozenset(
    ".".join(parts[:depth]) for parts in (key.split(".") for key in KNOWN) for depth in range(1, len(parts))
)


def is_on(value: Any) -> bool:
    """Whether a section asks for its feature: by its own "enabled", by one deeper in it, or else by being there."""
    if not isinstance(value, dict):
        return bool(value)
    switches = list(_switches({"enabled": value["enabled"]} if "enabled" in value else value))
    return any(switches) if switches else bool(value)


def _switches(value: Any) -> Iterator[bool]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key == "enabled":
            yield inner not in (False, "false", "auto", None, 0)
        yield from _switches(inner)


def nearest(key: str) -> str:
    """The known key that was probably meant: one beside it, or one of the same name elsewhere."""
    section, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in KNOWN | SECTIONS if name.rpartition(".")[0] == section}
    near = difflib.get_close_matches(leaf.lower(), sorted(beside), n=1)
    if near:
        return beside[near[0]]
    return next((name for name in sorted(KNOWN) if name.rpartition(".")[2] == leaf.lower()), "")
