"""The comparison is worth something: one bug of each kind makes it fail, and is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.ranks import run_ranks
from tests.parity import plants
from tests.parity.compare import STEADY, STEADY_FLAGS, initial, mismatches, reference
from tests.parity.harness import arguments, batches
from tests.parity.layouts import Layout, world_size
from tests.parity.layouts_models import BertLayout, T5Layout
from tests.parity.plants import train_with

NORM, MATRIX = "gradient of layers.3.input_layernorm.weight", "gradient of layers.3.mlp.linear_fc2.weight"
TABLE, HEAD = "gradient of embedding.word_embeddings.weight", "gradient of final_layernorm.weight"
LEARNED = "learned mha padded uneven - overlap"

CASES = {
    plants.row_without_all_reduce: (f"2 - 1 1 1f1b 1 0 - tied {LEARNED}", {"loss", NORM, MATRIX}, set()),
    plants.column_without_reduce: (f"2 - 1 1 1f1b 1 0 - tied {LEARNED}", {HEAD, NORM}, {"loss"}),
    plants.wrong_count: (f"1 - 1 1 1f1b 2 1 - tied {LEARNED}", {"loss", "gradient norm", MATRIX}, set()),
    plants.norm_counted_tp_times: (
        f"2 - 1 1 1f1b 1 0 - tied {LEARNED}",
        {"gradient norm"},
        {"loss", NORM, MATRIX, TABLE},
    ),
    plants.reduced_twice: (f"1 - 1 1 1f1b 2 0 - tied {LEARNED}", {"gradient norm", NORM, MATRIX, TABLE}, {"loss"}),
    plants.partial_sums_forgotten: (
        f"2 sp 1 1 1f1b 1 0 - tied {LEARNED}",
        {"gradient norm", NORM, "gradient of embedding.position_embeddings.weight"},
        {"loss", MATRIX, TABLE},
    ),
    plants.tied_ends_not_summed: (
        f"1 - 1 2 1f1b 1 0 - tied {LEARNED}",
        {"gradient norm", TABLE},
        {"loss", NORM, MATRIX},
    ),
    plants.ring_turned_round: (f"1 - ring4 1 1f1b 1 0 - tied {LEARNED}", {"loss", NORM, MATRIX}, set()),
    plants.positions_not_balanced: (f"1 - ring2 1 1f1b 1 0 - tied {LEARNED}", {"loss", NORM, MATRIX}, set()),
}
"""Bug -> the layout that has it, what the first step must name, and what must not be named there."""

POOLER, ENCODER = "gradient of pooler.weight", "gradient of encoder.layers.0.mlp.linear_fc2.weight"
TABLES = {f"gradient of embedding.{stack}_bias.weight" for stack in ("encoder", "decoder")}
BERT, T5 = BertLayout.parse, T5Layout.parse
OTHERS: dict[Callable[[], None], tuple[BertLayout | T5Layout, set[str], set[str]]] = {
    plants.padding_seen: (BERT("1 - 1 1 1f1b 1 0 - post binary padded uneven"), {"loss", NORM, POOLER}, set()),
    plants.losses_added_unweighted: (
        BERT("1 - 1 1 1f1b 2 1 - pre binary padded uneven"),
        {POOLER, NORM},
        {"loss", "sentence order loss", "gradient of lm_head.dense.weight"},
    ),
    plants.order_counted_by_every_part: (
        BERT("1 - a2a2 1 1f1b 1 0 - post binary padded uneven"),
        {POOLER},
        {"loss"},
    ),
    plants.tied_ends_not_summed: (
        T5("1 - 2 1 1f1b 1 0 - megatron 2+2 32+16 padded uneven"),
        {"gradient norm", TABLE},
        {"loss", ENCODER},
    ),
    plants.relative_tables_cut_off: (
        T5("1 - 2 - zbh1 1 1 block 1.0 3+1 32+16 padded uneven"),
        TABLES,
        {"loss", ENCODER, TABLE},
    ),
    plants.memory_cut_off: (T5("1 - 2 1 1f1b 1 0 - 1.1 1+2 32+16 padded uneven"), {ENCODER}, {"loss"}),
    plants.padding_of_the_encoder_seen: (
        T5("1 - 1 - 1f1b 1 0 - 1.1 1+1 32+16 padded uneven"),
        {"loss", ENCODER},
        set(),
    ),
}
"""The same for what only these models have."""


@pytest.mark.parametrize("plant", CASES, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_named(plant: Callable[[], None]) -> None:
    line, named, spared = CASES[plant]
    at_first = found_at_first(plant, Layout.parse(line))
    assert named <= at_first
    assert not spared & at_first


@pytest.mark.parametrize("plant", OTHERS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_of_bert_or_t5_is_named(plant: Callable[[], None]) -> None:
    layout, named, spared = OTHERS[plant]
    at_first = found_at_first(plant, layout)
    assert named <= at_first
    assert not spared & at_first


def found_at_first(plant: Callable[[], None], layout: Layout | BertLayout | T5Layout) -> set[str]:
    """What the first step of a run with the bug gets wrong."""
    argv = arguments(layout.model, *layout.flags(), *STEADY_FLAGS)
    params = {name: value.float() for name, value in initial(layout.model, 0.1).items()}
    shares = run_ranks(train_with, world_size(layout), plant, argv, params, batches(layout.model, 2, layout.mask))
    expected = reference(layout.model, 2, layout.mask, STEADY, 0.1)
    found = mismatches(shares, expected, loss=1e-5, norm=1e-5, gradient=1e-5)
    return {mismatch.quantity for mismatch in found if mismatch.step == 0}
