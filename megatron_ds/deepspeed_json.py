"""ds_config.json merged with the flags, in one place, so that nothing that either says is lost in silence.

Every key acts, is refused, or is said to have no effect; one that nobody knows is named with its nearest. Where a flag
that was typed and the file disagree, batch sizes, ZeRO stage and precision are refused; of the rest a table says what
was chosen. The file wins over what a recipe prefers. docs/ds_config.md has a row per key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_ds.cli import flags_of
from megatron_ds.config import GROUPS, Config
from megatron_ds.deepspeed_keys import (
    ACTING,
    DYNAMIC_SCALE,
    FEATURES,
    KNOWN,
    NO_EFFECT,
    SECTIONS,
    is_on,
    nearest,
    read,
)
from megatron_ds.errors import ConfigError, ConfigErrors


class Choice(NamedTuple):
    """One row of the table: what the file says, what the flag says, what holds, and why."""

    key: str
    file: str
    flag: str
    chosen: str
    why: str


@dataclass(frozen=True)
class Merged:
    """The configuration after the file, and what the user has to know about it."""

    config: Config
    chosen: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """`chosen` as lines of aligned columns; empty without rows."""
        if not self.chosen:
            return ""
        rows = [Choice._fields, *self.chosen]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(("ds_config.json and flags:", *(f"  {line}" for line in lines)))


def merge(config: Config, world_size: int) -> Merged:
    """Read the file that --deepspeed_config names, if --deepspeed is given, and put what it says into the config.

    Raises: ConfigErrors for every key that contradicts a typed flag or asks for what we do not have;
        ConfigError for a file that cannot be read
    """
    file = config.deepspeed.deepspeed_config
    if file is None:
        return Merged(config)
    if not config.deepspeed.deepspeed:
        return Merged(config, notes=(f"--deepspeed_config {file}: not read, because there is no --deepspeed",))
    merger = _Merger(config, world_size, file)
    merger.sort(read(file))
    for concern in (_batch, _zero, _precision, _loss_scale, _clipping, _recompute, _optimizer, _breakdown, _features):
        concern(merger)
    return merger.result()


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LIKE_DEEPSPEED = "DeepSpeed follows its file"


class _Merger:
    """The file's values on their way into a Config: what was changed, chosen, noted and found wrong so far."""

    def __init__(self, config: Config, world_size: int, file: str):
        self.config, self.world_size, self.file = config, world_size, file
        self.values: dict[str, Any] = {}
        """What the file says of keys that act, by dotted key; without "auto" and null."""
        self.raw: dict[str, Any] = {}
        """The same as it stands in the file."""
        self.auto: set[str] = set()
        self.changes: dict[str, Any] = {}
        """New values by 'group.field'."""
        self.rows: list[Choice] = []
        self.notes: list[str] = []
        self.idle: dict[str, list[str]] = {}
        """Keys without effect by the reason for it."""
        self.errors: list[ConfigError] = []

    def sort(self, content: dict[str, Any]) -> None:
        """Known keys into `values`, read as what they are; others into `notes`."""
        if "bf16" not in content and "bfloat16" in content:
            content = {("bf16" if key == "bfloat16" else key): value for key, value in content.items()}
        for key, value in self._flat(content, ""):
            if key not in KNOWN:
                near = nearest(key)
                self.notes.append(f"{key}: nobody reads this key" + (f"; did you mean {near}?" if near else ""))
            elif value == "auto":
                self.auto.add(key)
            elif value is None:
                continue
            elif key in NO_EFFECT:
                usual, reason = NO_EFFECT[key]
                if value != usual and (is_on(value) or not isinstance(value, dict)):
                    self.without_effect(key, reason)
            else:
                self.raw[key] = value
                try:
                    self.values[key] = ACTING[key](value) if key in ACTING else value
                except ValueError as error:
                    self.refuse(key, json.dumps(value)[:80], str(error))

    def _flat(self, content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in content.items():
            key = prefix + name
            if key not in SECTIONS:
                yield key, value
            elif isinstance(value, dict):
                yield from self._flat(value, f"{key}.")
            elif key == "zero_optimization" and isinstance(value, bool):  # how stage 1 was once asked for
                yield "zero_optimization.stage", int(value)
            elif value not in (None, "auto"):
                self.refuse(key, json.dumps(value)[:80], "an object: {...}")

    def now(self, name: str) -> Any:
        """The value of 'group.field' as it stands."""
        group, field = name.split(".")
        return self.changes[name] if name in self.changes else getattr(getattr(self.config, group), field)

    def typed(self, *names: str) -> bool:
        """Whether the command line gave one of these fields."""
        return not self.config.typed.isdisjoint(names)

    def take(self, key: str, name: str, *, binding: bool = False, flag_wins: bool = False, why: str = "") -> None:
        """Put the file's value, if it has one, into 'group.field'.

        If the flag was typed and differs: binding, refuse; otherwise choose, say which and `why`.
        """
        if key not in self.values or self.values[key] == self.now(name):
            return
        value, flag = self.values[key], self.flag(name)
        if name not in self.config.typed:
            self.put(key, name, value)
        elif binding:
            leaf = key.split(".")[-1]
            found = f"{_shown(self.raw[key])}, and {flag} on the command line"
            self.refuse(key, found, "one and the same", f'"{leaf}": "auto" takes what the command line says')
        else:
            self.changes[name] = self.now(name) if flag_wins else value
            chosen = self.changes[name]
            # of all that is chosen here only a loss scale can be None
            self.rows.append(
                Choice(key, _shown(self.raw[key]), flag, "dynamic" if chosen is None else _shown(chosen), why)
            )

    def put(self, key: str, name: str, value: Any, why: str = "only the file says it") -> None:
        """Set 'group.field', about which no flag was typed."""
        self.changes[name] = value
        self.rows.append(Choice(key, _shown(self.raw.get(key)), _shown(None), _shown(value), why))

    def flag(self, name: str) -> str:
        """How 'group.field' would be typed to have the value that it has."""
        group, field = name.split(".")
        flag = next(flag for flag in flags_of(GROUPS[group]) if flag.field == field).names[0]
        value = self.now(name)
        return flag if isinstance(value, bool) else f"{flag} {_shown(value)}"

    def without_effect(self, key: str, reason: str) -> None:
        """Say so at the end, once for all keys with this reason."""
        self.idle.setdefault(reason, []).append(key)

    def refuse(self, key: str, found: str, expected: str, fix: str = "") -> None:
        """Keep an error about one key of the file."""
        self.errors.append(ConfigError(f"{self.file}: {key}", found, expected, fix))

    def result(self) -> Merged:
        """The new config.

        Raises: ConfigErrors with everything that was refused
        """
        if self.errors:
            raise ConfigErrors(self.errors)
        groups: dict[str, dict[str, Any]] = {}
        for name, value in self.changes.items():
            group, field = name.split(".")
            groups.setdefault(group, {})[field] = value
        new = {group: dataclasses.replace(getattr(self.config, group), **fields) for group, fields in groups.items()}
        idle = [f"{', '.join(keys)}: no effect: {reason}" for reason, keys in self.idle.items()]
        return Merged(dataclasses.replace(self.config, **new), tuple(self.rows), (*self.notes, *idle))


def _batch(m: _Merger) -> None:
    """train_batch_size = micro-batch x accumulation steps x data-parallel ranks: two give the third, one the others."""
    training, errors = m.config.training, len(m.errors)
    if training.step_batch_size_schedule and "train_batch_size" in m.values:
        del m.values["train_batch_size"]
        m.without_effect("train_batch_size", "--step-batch-size-schedule says it")
    m.take("train_batch_size", "training.global_batch_size", binding=True)
    m.take("train_micro_batch_size_per_gpu", "training.micro_batch_size", binding=True)
    if training.rampup_batch_size or training.step_batch_size_schedule or training.decrease_batch_size_if_needed:
        if "gradient_accumulation_steps" in m.values:
            m.without_effect("gradient_accumulation_steps", "it follows from the batch, which changes during the run")
    elif len(m.errors) == errors and not m.values.keys().isdisjoint(BATCH_KEYS):
        _accumulation(m)


def _accumulation(m: _Merger) -> None:
    parallel = m.config.parallel
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_size
    batch, micro = m.now("training.global_batch_size"), m.now("training.micro_batch_size")
    steps = m.values.get("gradient_accumulation_steps")
    given = [number for number in (tp, pp, cp, batch, micro) if number is not None]
    if min(given) < 1 or m.world_size % (tp * pp * cp):
        return  # the rules of layout and flags say so
    dp = m.world_size // (tp * pp * cp)
    ranks = f"{dp} data-parallel rank{'s' * (dp > 1)} ({m.world_size} / tp {tp} / pp {pp} / cp {cp})"
    if batch is None and micro and steps:
        why = f"micro-batch {micro} x {steps} accumulation steps x {ranks}"
        m.put("train_batch_size", "training.global_batch_size", micro * steps * dp, why)
    elif batch is None:
        return
    elif micro and steps and batch != micro * steps * dp:
        product, even = micro * steps * dp, batch % (micro * dp) == 0
        found = f"{batch}, but micro-batch {micro} x {steps} accumulation steps x {ranks} = {product}"
        better = f'"gradient_accumulation_steps": {batch // (micro * dp)}, or ' if even else ""
        m.refuse("train_batch_size", found, "equal numbers", f'{better}"train_batch_size": {product}')
    elif batch % ((micro or steps or 1) * dp):
        share = (micro or steps or 1) * dp
        what = f"micro-batch {micro}" if micro else f"{steps or 1} accumulation step{'s' * ((steps or 1) > 1)}"
        near = max(1, round(batch / share)) * share
        m.refuse(
            "train_batch_size",
            f"{batch}, with {what} on {ranks}",
            f"a multiple of {share}",
            f'"train_batch_size": {near}',
        )
    elif micro is None:
        why = f"batch {batch} / {steps or 1} accumulation steps / {ranks}"
        m.put(BATCH_KEYS[1], "training.micro_batch_size", batch // ((steps or 1) * dp), why)


def _zero(m: _Merger) -> None:
    """Stage, buckets, overlap."""
    key, stage, optimizer = "zero_optimization.stage", m.values.get("zero_optimization.stage"), m.config.optimizer
    if stage is not None and not 0 <= stage <= 2:
        m.refuse(key, str(stage), "0, 1 or 2: parameters are not shared among data-parallel ranks", '"stage": 2')
    elif stage is not None and stage != optimizer.effective_zero_stage:
        if m.typed("optimizer.zero_stage", "optimizer.use_distributed_optimizer"):
            name = "zero_stage" if optimizer.zero_stage is not None else "use_distributed_optimizer"
            found = f"{stage}, and {m.flag(f'optimizer.{name}')} on the command line"
            m.refuse(key, found, "one and the same", f"--zero-stage {stage}")
        else:
            m.put(key, "optimizer.zero_stage", stage)
            m.changes["optimizer.use_distributed_optimizer"] = False
    m.take("zero_optimization.reduce_bucket_size", "optimizer.reduce_bucket_size", why=LIKE_DEEPSPEED)
    _overlap(m)
    gathered = m.values.get("zero_optimization.allgather_bucket_size")
    if gathered not in (None, m.now("optimizer.reduce_bucket_size")):
        reason = "parameters are gathered in the buckets of gradients"
        m.without_effect("zero_optimization.allgather_bucket_size", reason)


def _overlap(m: _Merger) -> None:
    key, name = "zero_optimization.overlap_comm", "optimizer.overlap_grad_reduce"
    if m.values.get(key) is False and m.typed("compat.overlap_grad_reduce_on"):
        m.changes[name] = False
        m.rows.append(Choice(key, "false", "--overlap-grad-reduce", "false", LIKE_DEEPSPEED))
    m.take(key, name, why=LIKE_DEEPSPEED)


def _precision(m: _Merger) -> None:
    """fp16, bf16, and the type in which gradients are summed."""
    if m.values.get("fp16.enabled") and m.values.get("bf16.enabled"):
        m.refuse("fp16.enabled and bf16.enabled", "both", "one of them", '"fp16": {"enabled": false}')
        return
    for name, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if m.values.get(f"{name}.enabled") and m.now(f"precision.{other}"):
            if m.typed(f"precision.{other}"):
                fix = f'--{name} instead of --{other}, or "{name}": {{"enabled": false}}'
                m.refuse(f"{name}.enabled", f"true, and --{other} on the command line", "one of them", fix)
                return
            m.changes[f"precision.{other}"] = False
        m.take(f"{name}.enabled", f"precision.{name}", binding=True)
    m.take("data_types.grad_accum_dtype", "precision.grad_reduce_in_bf16", binding=True)
    sent = m.values.get("communication_data_type")
    if sent not in (None, "bf16" if m.now("precision.grad_reduce_in_bf16") else "fp32"):
        reason = "gradients travel as they are summed, in fp32, or with --grad-reduce-in-bf16 in bf16"
        m.without_effect("communication_data_type", reason)


def _loss_scale(m: _Merger) -> None:
    """Where the file speaks of fp16, DeepSpeed's rule and defaults; typed flags fill in what the file leaves out."""
    said = m.values.keys() | m.auto
    if not m.now("precision.fp16") or not any(key.startswith("fp16.") for key in said):
        return
    m.changes["precision.deepspeed_loss_scaling"] = True
    # DeepSpeed's own oddity: with none of these keys its scaler starts at 2^32 and has no hysteresis
    tuned = any(f"fp16.{key}" in said for key in DYNAMIC_SCALE)
    for key, name, default in (
        ("loss_scale", "loss_scale", None),
        ("initial_scale_power", "initial_loss_scale", 2.0**16 if tuned else 2.0**32),
        ("loss_scale_window", "loss_scale_window", 1000),
        ("hysteresis", "hysteresis", 2 if tuned else 1),
        ("min_loss_scale", "min_loss_scale", 1.0),
    ):
        if f"fp16.{key}" in m.values:
            m.take(f"fp16.{key}", f"precision.{name}", why=LIKE_DEEPSPEED)
        elif f"fp16.{key}" not in m.auto and not m.typed(f"precision.{name}"):
            m.changes[f"precision.{name}"] = default


def _clipping(m: _Merger) -> None:
    """The file's limit; without one, the flag's."""
    m.take("gradient_clipping", "optimizer.clip_grad", why=LIKE_DEEPSPEED)
    if "gradient_clipping" not in m.values.keys() | m.auto and m.config.optimizer.clip_grad:
        limit = m.flag("optimizer.clip_grad")
        m.notes.append(f"gradient_clipping is not in the file: {limit} holds (DeepSpeed would not clip)")


def _recompute(m: _Merger) -> None:
    """activation_checkpointing says how kept inputs are kept; whether any are, only flags say."""
    full, tp = m.config.recompute.granularity == "full", m.config.parallel.tensor_model_parallel_size
    for key, name in (
        ("activation_checkpointing.partition_activations", "recompute.distribute_saved_activations"),
        ("activation_checkpointing.cpu_checkpointing", "recompute.checkpoint_in_cpu"),
    ):
        if not m.values.get(key):
            if key in m.values and m.now(name):
                m.take(key, name, why="the flag or the file may ask for it", flag_wins=True)
        elif not full:
            m.without_effect(key, "no layer is recomputed; --recompute-granularity full does that")
        elif "partition" in key and tp == 1:
            m.without_effect(key, "there is one tensor-parallel rank")
        else:
            m.take(key, name)


def _optimizer(m: _Merger) -> None:
    """Megatron-DeepSpeed builds its optimizer from the flags; the section fills in what they leave out."""
    kind = m.values.get("optimizer.type", "adam").lower()
    if kind not in ("adam", "adamw"):
        one_bit = "; compressed gradients are not supported" if kind.startswith(("onebit", "zeroone")) else ""
        m.refuse("optimizer.type", m.raw["optimizer.type"], f"Adam or AdamW{one_bit}", '"type": "AdamW"')
    betas = m.values.get("optimizer.params.betas", (None, None))
    for key, value in zip(("optimizer.params.betas[0]", "optimizer.params.betas[1]"), betas, strict=True):
        if value is not None:
            m.values[key] = m.raw[key] = value
    for key, name in (
        ("lr", "lr"),
        ("weight_decay", "weight_decay"),
        ("eps", "adam_eps"),
        ("betas[0]", "adam_beta1"),
        ("betas[1]", "adam_beta2"),
    ):
        why = "Megatron-DeepSpeed builds its optimizer from the flags"
        m.take(f"optimizer.params.{key}", f"optimizer.{name}", why=why, flag_wins=True)
    if m.values.get("optimizer.params.max_grad_norm"):
        limit = m.values["optimizer.params.max_grad_norm"]
        m.refuse("optimizer.params.max_grad_norm", _shown(limit), "nothing", f'"gradient_clipping": {_shown(limit)}')
    for name in ("bias_correction", "adam_w_mode"):
        if m.values.get(f"optimizer.params.{name}") is False:
            m.refuse(f"optimizer.params.{name}", "false", "true: AdamW is the only rule", "leave it out")


def _breakdown(m: _Merger) -> None:
    """wall_clock_breakdown is Megatron's timing level 2."""
    if m.values.get("wall_clock_breakdown") and m.now("logging.timing_log_level") < 2:
        m.values["wall_clock_breakdown"] = 2
        m.take("wall_clock_breakdown", "logging.timing_log_level", why=LIKE_DEEPSPEED)


def _features(m: _Merger) -> None:
    """What would change the training and is not here."""
    for key, fix in FEATURES.items():
        if is_on(m.values.get(key)):
            m.refuse(key, "switched on", "off: this is not supported", fix)


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)
