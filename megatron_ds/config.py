"""The whole configuration: what was typed, one frozen group per concern, and where each value came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ds.checkpoint.config import CheckpointConfig
from megatron_ds.cli import Flag, Parser, arg, field_names, flags_of
from megatron_ds.compat import HINTS, CompatConfig
from megatron_ds.data.config import DataConfig, TokenizerConfig
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.kernels.config import KernelConfig
from megatron_ds.model.config import RecomputeConfig, TransformerConfig
from megatron_ds.optim.config import LRConfig, OptimizerConfig, PrecisionConfig
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.presets import PRESETS, preset_values
from megatron_ds.training.config import LoggingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class PresetConfig:
    """Published models."""

    model_preset: str | None = arg(
        None, f"Architecture of a published model; what is typed wins. {', '.join(PRESETS)}.", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """DeepSpeed."""

    deepspeed: bool = arg(False, "Read --deepspeed_config; see docs/ds_config.md.", "--deepspeed", "--deepscale")
    deepspeed_config: str | None = arg(
        None,
        "ds_config.json, merged with the flags; where the two disagree a table says what was chosen.",
        "--deepspeed_config",
        "--deepscale_config",
        metavar="FILE",
    )


COMMAND_LINE, RECIPE, DEFAULT = "command line", "recipe", "default"
"""Where values come from, besides presets, ds_config.json and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every group of flags; constructible without a command line."""

    model: TransformerConfig
    recompute: RecomputeConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    lr: LRConfig
    precision: PrecisionConfig
    kernels: KernelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    deepspeed: DeepSpeedConfig
    compat: CompatConfig
    preset: PresetConfig = PresetConfig()
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Where values came from, by 'optimizer.lr'; all others are defaults."""

    @property
    def typed(self) -> frozenset[str]:
        """The fields that hold what the command line gave, as 'optimizer.lr'."""
        return frozenset(name for name, origin in self.origins.items() if origin == COMMAND_LINE)

    def value(self, name: str) -> Any:
        """The value of 'group.field'."""
        group, field = name.split(".")
        return getattr(getattr(self, group), field)

    def describe(self) -> str:
        """Every value, in Megatron's block of arguments."""
        groups = (getattr(self, name) for name in GROUPS if name != "compat")
        values = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
        lines = [f"  {name} ".ljust(50, ".") + f" {values[name]}" for name in sorted(values, key=str.lower)]
        head = "------------------------ arguments ------------------------"
        tail = "-------------------- end of arguments ---------------------"
        return "\n".join((head, *lines, tail))


GROUPS: dict[str, type] = {
    "preset": PresetConfig,
    "model": TransformerConfig,
    "recompute": RecomputeConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "lr": LRConfig,
    "precision": PrecisionConfig,
    "kernels": KernelConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "deepspeed": DeepSpeedConfig,
    "compat": CompatConfig,
}


def parser(prog: str | None = None) -> Parser:
    """The parser of a recipe, its help grouped by concern."""
    out = Parser(prog=prog, description="Pretrain a language model on any layout of ranks.")
    out.usage = f"{out.prog} [flags]     (torchrun --nproc-per-node N {out.prog} [flags] for N ranks)"
    for group in GROUPS.values():
        out.add_config(group)
    out.hints |= HINTS
    return out


def parse(argv: Sequence[str], defaults: Mapping[str, Any] | None = None, prog: str | None = None) -> Config:
    """Read a command line: what was typed wins over --model-preset, which wins over the recipe's `defaults`.

    Raises: ConfigError for the first thing in it that cannot be understood
    """
    reader, recipe = parser(prog), dict(defaults or {})
    words = reader.read(argv)
    typed = {key.split(".")[1]: value for key, value in words.items()}
    preset = typed.get("model_preset", recipe.get("model_preset"))
    chosen = preset_values(preset, recipe.get("model_type", "GPT"), typed) if preset else {}
    groups: list[Any] = reader.build(list(GROUPS.values()), words, recipe | chosen)
    homes = {field: f"{name}.{field}" for name, group in GROUPS.items() for field in field_names(group)}
    origins = dict.fromkeys(recipe, RECIPE) | dict.fromkeys(chosen, f"preset {preset}")
    origins |= dict.fromkeys(typed, COMMAND_LINE)
    return Config(
        **dict(zip(GROUPS, groups, strict=True)),
        origins={homes[field]: origin for field, origin in origins.items()},
    )


def attributed(before: Config, after: Config, origin: str) -> Config:
    """`after`, with whatever differs from `before` put down to `origin`."""
    return dataclasses.replace(after, origins={**after.origins, **dict.fromkeys(differences(before, after), origin)})


def differences(before: Config, after: Config) -> list[str]:
    """The fields, as 'optimizer.lr', that differ."""
    names = (f"{name}.{field}" for name, group in GROUPS.items() for field in field_names(group))
    return [name for name in names if before.value(name) != after.value(name)]


FILES = ("vocab_file", "merge_file", "tokenizer_model")
"""Of the tokenizer; a path that is typed says where the file lies now, whatever the checkpoint remembers."""

NOT_STORED = ("attention_dropout", "hidden_dropout", "init_method_std")
"""Of the model; what the flags say of these holds whatever the checkpoint was trained with."""


def with_checkpoint_model(config: Config, state: Mapping[str, Any]) -> Config:
    """The model and tokenizer of a checkpoint, given its state, in place of what the flags say (--use-checkpoint-args).

    Raises: ConfigError if the checkpoint belongs to another recipe; CheckpointError if its state cannot be read
    """
    where = f"--load {config.checkpoint.load}"
    try:
        model = TransformerConfig.from_state({**state["model"], "max_position_embeddings": state["max_positions"]})
        stored = dataclasses.asdict(TokenizerConfig(**state["tokenizer"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            where,
            f"a checkpoint whose model cannot be read: {error}",
            "what a run of this version writes",
            "leave --use-checkpoint-args out and give the flags that it was trained with",
        ) from error
    if model.model_type != config.model.model_type:
        raise ConfigError(
            where,
            f"a {model.model_type} model, in a recipe for {config.model.model_type}",
            f"a checkpoint of {config.model.model_type}",
            f"pretrain_{model.model_type.lower()}.py",
        )
    kept_model = {name: getattr(config.model, name) for name in NOT_STORED}
    model = dataclasses.replace(model, **kept_model)
    kept = {field for field in FILES if f"tokenizer.{field}" in config.typed} | {"make_vocab_size_divisible_by"}
    taken = {field: value for field, value in stored.items() if field not in kept and value is not None}
    tokenizer = dataclasses.replace(config.tokenizer, **taken)
    lengths = {
        name: state.get(name) for name in ("seq_length", "decoder_seq_length") if f"data.{name}" not in config.typed
    }
    data = dataclasses.replace(config.data, **{name: length for name, length in lengths.items() if length})
    after = dataclasses.replace(config, model=model, tokenizer=tokenizer, data=data)
    return attributed(config, after, f"checkpoint {config.checkpoint.load}")


def overridden(before: Config, after: Config) -> list[str]:
    """A line for each flag that was typed and does not hold."""
    flags = {f"{name}.{flag.field}": flag for name, group in GROUPS.items() for flag in flags_of(group)}
    return [
        f"{flags[name].names[0]}: {shown(flags[name], before.value(name))} was typed, "
        f"{shown(flags[name], after.value(name))} holds ({after.origins[name]})"
        for name in differences(before, after)
        if name in before.typed
    ]


def shown(flag: Flag, value: Any) -> str:
    """A value as one would type it; of a switch whether it is on."""
    if "action" in flag.options:
        return "on" if value is (flag.options["action"] == "store_true") else "off"
    if value is None or value == ():
        return "-"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def explain(config: Config) -> str:
    """Every flag, its value and where that came from, group by group, defaults last; and what follows from them."""
    sections = [(title, rows) for name, group in GROUPS.items() for title, rows in [_section(config, name, group)]]
    sections.append(("What follows", [(what, value, "") for what, value in _derived(config).items()]))
    widths = [max(len(row[column]) for _, rows in sections for row in rows) for column in (0, 1)]
    lines = []
    for title, rows in sections:
        lines += ["", title] if rows else []
        for name, value, origin in rows:
            lines.append(f"  {name.ljust(widths[0])}  {value.ljust(min(widths[1], 40))}  {origin}".rstrip())
    return "\n".join(lines[1:])


def _section(config: Config, name: str, group: type) -> tuple[str, list[tuple[str, str, str]]]:
    """A group's title and rows; of what has no effect only what was given."""
    rows = []
    for flag in flags_of(group):
        origin = config.origins.get(f"{name}.{flag.field}", DEFAULT)
        if group is not CompatConfig or origin != DEFAULT:
            rows.append((flag.names[0], shown(flag, config.value(f"{name}.{flag.field}")), origin))
    rows.sort(key=lambda row: row[2] == DEFAULT)
    return (group.__doc__ or "").splitlines()[0].rstrip("."), rows


def _derived(config: Config) -> dict[str, str]:
    """What the flags leave to be worked out, as far as they were given."""
    return dict(_model_facts(config.model)) | {
        "schedule": config.parallel.schedule_name,
        "recomputation": config.recompute.granularity or "none",
        "ZeRO stage": str(config.optimizer.effective_zero_stage),
    }


def _model_facts(model: TransformerConfig) -> Iterator[tuple[str, str]]:
    yield "model", model.model_type
    if model.model_type == "T5" and (model.num_layers or model.encoder_num_layers):
        yield "layers", f"{model.encoder_layers} in the encoder, {model.decoder_layers} in the decoder"
    if model.hidden_size and model.num_attention_heads:
        yield "head size", str(model.head_size)
        yield "key/value heads", str(model.kv_heads)
    if model.hidden_size:
        yield "MLP width", str(model.ffn_size)
    yield "activation", model.activation
    yield "positions", model.positions
