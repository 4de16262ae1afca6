"""The model's configuration, read back from checkpoints of any age."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ds.model.config import TransformerConfig

SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
NEW = ("bias_gelu_fusion", "openai_gelu", "relu", "model_type", "window_size")


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "gelu_tanh"),
        ({"add_bias_linear": False}, "gelu_tanh"),
        ({"add_bias_linear": False, "swiglu": True}, "swiglu"),
    ],
)
def test_a_state_from_before_there_were_activations_keeps_its_own(options: dict[str, bool], kernel: str) -> None:
    """Then GELU was the tanh form, biases or not."""
    state = dataclasses.asdict(TransformerConfig(**SIZES, **options))
    old = {name: value for name, value in state.items() if name not in NEW}
    assert TransformerConfig.from_state(old).kernel == kernel


def test_gelu_without_biases_is_by_erf_as_in_megatron() -> None:
    assert TransformerConfig(**SIZES).kernel == "gelu_tanh"
    assert TransformerConfig(**SIZES, add_bias_linear=False).kernel == "gelu"
    assert TransformerConfig(**SIZES, add_bias_linear=False, openai_gelu=True).kernel == "gelu_tanh"
    assert TransformerConfig(**SIZES, bias_gelu_fusion=False).kernel == "gelu"
    assert TransformerConfig(**SIZES, add_bias_linear=False, glu_activation="geglu").kernel == "geglu_tanh"


def test_unknown_and_impossible_states_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown model options colour"):
        TransformerConfig.from_state({**dataclasses.asdict(TransformerConfig(**SIZES)), "colour": "red"})
    with pytest.raises(ValueError, match="hidden_size 0"):
        TransformerConfig.from_state({**dataclasses.asdict(TransformerConfig(**SIZES)), "hidden_size": 0})
