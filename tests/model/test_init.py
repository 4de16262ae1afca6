"""Initial weights depend on name and seed, never on the layout; their scale is Megatron's."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.gpt import GPTModel, Stage
from megatron_ds.model.init import initial_values
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.context import Axis, Sharding
from megatron_ds.parallel.spec import ParamSpec

CONFIG = TransformerConfig(num_layers=4, hidden_size=128, num_attention_heads=4, num_key_value_heads=4, swiglu=True)


def table(stage: Stage, tp: int = 1) -> dict[str, ParamSpec]:
    vocab, runtime = Vocab(131, 128 * (1 + tp)), Runtime(Sharding(Axis("tp", tp, 0)))
    return GPTModel(CONFIG, vocab, stage, max_positions=16, runtime=runtime, device="meta").table()


WHOLE = table(Stage(0, 4, True, True))


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_are_cut_from_the_same_whole(tp: int) -> None:
    cut = table(Stage(0, 4, True, True), tp)
    assert cut.keys() == WHOLE.keys()
    for name, spec in WHOLE.items():
        expected = initial_values(spec, 7, 0, 1)[: spec.shape[0]]
        found = torch.full(spec.shape, torch.nan)
        for rank in range(tp):
            for piece in cut[name].pieces(initial_values(cut[name], 7, rank, tp), rank, tp):
                found[piece.box.slices()] = piece.tensor
        assert torch.equal(found, expected), name


def test_stages_hold_the_layers_of_the_whole() -> None:
    first, last = table(Stage(0, 2, True, False)), table(Stage(2, 4, False, True))
    assert set(first) | set(last) == set(WHOLE)
    assert set(first) & set(last) == {"embedding.word_embeddings.weight"}
    assert last["embedding.word_embeddings.weight"].owned_by_first_stage
    assert not first["embedding.word_embeddings.weight"].owned_by_first_stage
    for name, spec in last.items():
        assert torch.equal(initial_values(spec, 7, 0, 1)[:131], initial_values(WHOLE[name], 7, 0, 1)[:131])


def test_scales_are_megatrons() -> None:
    for name, spec in WHOLE.items():
        values = initial_values(spec, 7, 0, 1)
        if name.endswith("bias"):
            assert (values == 0).all()
        elif "layernorm" in name:
            assert (values == 1).all()
        else:
            scaled = "linear_proj" in name or "linear_fc2" in name
            std = 0.02 / math.sqrt(2 * 4) if scaled else 0.02
            # The spread of a sample's standard deviation is std / sqrt(2 n); rows of padding are left out.
            kept = values[: spec.shape[0]]
            assert kept.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * kept.numel())), name


def test_seed_and_name_matter() -> None:
    one, other = WHOLE["layers.0.mlp.linear_fc1.weight"], WHOLE["layers.1.mlp.linear_fc1.weight"]
    assert not torch.equal(initial_values(one, 7, 0, 1), initial_values(other, 7, 0, 1))
    assert not torch.equal(initial_values(one, 7, 0, 1), initial_values(one, 8, 0, 1))


def test_weight_decay_spares_biases_and_norms() -> None:
    assert {name for name, spec in WHOLE.items() if not spec.decay} == {
        name for name, spec in WHOLE.items() if len(spec.shape) == 1
    }
