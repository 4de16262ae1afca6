"""A family: one architecture of Hugging Face, its config both ways, and its table of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ds.convert.rules import Rule
from megatron_ds.errors import CheckpointError
from megatron_ds.model.config import ModelType, TransformerConfig


class Fields:
    """A config.json, asked field by field.

    untied: whether the weights hold an output matrix of their own, which their config alone does not tell.
    """

    def __init__(self, values: Mapping[str, Any], where: str, untied: bool = False):
        self.values, self.where, self.untied = values, where, untied

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there and not null, else the default."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises: CheckpointError
        """
        value = self.get(*names, default=default)
        if type(value) is not int or value < 1:
            raise self.misfit(names[0], value, "a positive whole number")
        return value

    def number(self, name: str, default: float) -> float:
        """A number.

        Raises: CheckpointError
        """
        value = self.get(name, default=default)
        if type(value) not in (int, float):
            raise self.misfit(name, value, "a number")
        return float(value)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse what is neither absent nor one of `allowed`.

        Raises: CheckpointError
        """
        value = self.get(name, default=allowed[0])
        if value not in allowed:
            raise self.misfit(name, value, " or ".join(map(repr, allowed)))

    def misfit(self, name: str, value: Any, expected: str) -> CheckpointError:
        """The error for a field that describes no model of ours."""
        return CheckpointError(
            f"{self.where}: {name}", f"{value!r:.120}", expected, "megatron_ds has no model of this kind"
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture over there.

    name: its class. key: `model_type` of its config.json. of: our model.
    config: theirs -> ours. fields: ours and the rows of the position table -> theirs. rules: all tensors of a model.
    base: prefix that files of the headless model leave out. ignored: names (a pattern) of buffers and tied copies.
    embedding, head: names of the embedding and of an untied output matrix ("": there is none).
    """

    name: str
    key: str
    of: ModelType
    config: Callable[[Fields], TransformerConfig]
    fields: Callable[[TransformerConfig, int], dict[str, Any]]
    rules: Callable[[TransformerConfig], list[Rule]]
    base: str
    ignored: str
    embedding: str
    head: str = ""


_GELUS = {"gelu": False, "gelu_python": False} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), True
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def read_activation(fields: Fields, name: str, default: str) -> dict[str, Any]:
    """Our options for an activation without a gate.

    Raises: CheckpointError for one that we lack
    """
    value = fields.get(name, default=default)
    if value == "relu":
        return {"relu": True}
    if value not in _GELUS:
        raise fields.misfit(name, value, f"one of {', '.join(_GELUS)}, relu")
    return {"bias_gelu_fusion": _GELUS[value]}


def activation_name(config: TransformerConfig) -> str:
    """Their name of our activation, or ours where there is none: the way back then tells the difference."""
    return _ACTIVATIONS.get(config.activation, config.activation)


def read_rope(fields: Fields, default_percent: float) -> dict[str, Any]:
    """Our options for rotary positions, as transformers 4 or 5 writes them.

    Raises: CheckpointError for a kind of scaling that we lack
    """
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.get(name, default={})
        if not isinstance(given, dict):
            raise fields.misfit(name, given, "an object")
        found |= given
    where = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", fields.get("rope_theta", "rotary_emb_base", default=10000.0))
    percent = found.get("partial_rotary_factor", fields.get("partial_rotary_factor", "rotary_pct"))
    options: dict[str, Any] = {"position_embedding_type": "rope"}
    try:
        options["rotary_base"] = float(theta)
        options["rotary_percent"] = default_percent if percent is None else float(percent)
        if kind == "linear":
            options["rotary_seq_len_interpolation_factor"] = float(found["factor"])
        elif kind == "llama3":
            options["use_rope_scaling"] = True
            options["rope_scaling_original_max_position_embeddings"] = int(found["original_max_position_embeddings"])
            for name in ("factor", "low_freq_factor", "high_freq_factor"):
                options[f"rope_scaling_{name}"] = float(found[name])
        elif kind != "default":
            raise fields.misfit(f"{where}: rope_type", kind, "default, linear or llama3")
    except (KeyError, TypeError, ValueError) as wrong:
        raise fields.misfit(where, wrong, f"numbers, all that rope_type {kind} has") from None
    return options


def rope_fields(config: TransformerConfig) -> dict[str, Any]:
    """Rotary positions as published configs have them and as transformers 5 writes them."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.use_rope_scaling:
        scaling = {"rope_type": "llama3"}
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            scaling[name] = vars(config)[f"rope_scaling_{name}"]
    elif config.rotary_seq_len_interpolation_factor:
        scaling = {"rope_type": "linear", "factor": config.rotary_seq_len_interpolation_factor}
    full = {**scaling, "rope_theta": config.rotary_base}
    if config.rotary_percent != 1:
        full["partial_rotary_factor"] = config.rotary_percent
    plain = scaling["rope_type"] == "default"
    return {"rope_theta": config.rotary_base, "rope_scaling": None if plain else scaling, "rope_parameters": full}
