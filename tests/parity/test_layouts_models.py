"""Any layout trains the same BERT, the same T5 and the same GPT of any kin: five steps equal the oracle everywhere."""

from __future__ import annotations

import pytest

from tests.parity.compare import STEADY, STEADY_FLAGS, run_and_compare
from tests.parity.layouts import world_size
from tests.parity.layouts_models import (
    BERT_TABLE,
    KIN,
    KIN_TABLE,
    LAYOUTS,
    T5_TABLE,
    BertLayout,
    KinLayout,
    T5Layout,
    lines,
)
from tests.parity.models import arguments

OPTIONS = {
    BERT_TABLE: {
        "tp": "1 2 4",
        "sp": "- sp",
        "cp": "1 a2a2",
        "pp": "1 2 4",
        "schedule": "1f1b gpipe interleaved zbh1",
        "dp": "1 2",
        "zero": "0 1 2",
        "recompute": "- selective mlp uniform block host spread",
        "norms": "pre post",
        "head": "binary words",
        "vocab": "padded exact",
        "mask": "full uneven",
    },
    T5_TABLE: {
        "tp": "1 2 4",
        "sp": "- sp",
        "pp": "1 2 4",
        "split": "- 1 2 3",
        "schedule": "1f1b gpipe interleaved zbh1",
        "dp": "1 2",
        "zero": "0 1 2",
        "recompute": "- selective mlp uniform block host spread",
        "kind": "megatron 1.0 1.1",
    },
    KIN_TABLE: {"kind": " ".join(KIN), "mask": "uneven packed", "cp": "1 a2a2 ring2"},
}
"""What has to occur in each table."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_five_steps_equal_the_oracle(layout: BertLayout | T5Layout | KinLayout) -> None:
    argv = arguments(layout.model, *layout.flags(), *STEADY_FLAGS)
    found = run_and_compare(
        layout.model, argv, world_size(layout), steps=5, mask=layout.mask, optimizer=STEADY, std=0.1
    )
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("table", OPTIONS, ids=["bert", "t5", "gpt"])
def test_every_option_occurs(table: str) -> None:
    head = table.split("\n")[1].split()
    for option, wanted in OPTIONS[table].items():
        assert {line.split()[head.index(option)] for line in lines(table)} == set(wanted.split()), option


def test_the_heads_of_the_tables_are_the_fields() -> None:
    for kind, table in ((BertLayout, BERT_TABLE), (T5Layout, T5_TABLE), (KinLayout, KIN_TABLE)):
        assert table.split("\n")[1].split() == list(kind._fields)
    assert len(set(map(str, LAYOUTS))) == len(LAYOUTS)
