"""Sharding arithmetic: every element of a global tensor lies where the regions say, once."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_ds.parallel.spec import Box, Init, ParamSpec, Split, flat_boxes

ZEROS = Init("zeros")
SPECS = [
    ParamSpec("replicated", (5, 3), ZEROS),
    ParamSpec("qkv", (16, 6), ZEROS, Split(0, (8, 4, 4))),
    ParamSpec("bias", (16,), ZEROS, Split(0, (8, 4, 4))),
    ParamSpec("row", (3, 8), ZEROS, Split(1)),
    ParamSpec("vocabulary", (9, 3), ZEROS, Split(0, padded_to=16)),
]


def test_a_fused_matrix_is_cut_inside_each_part() -> None:
    spec = SPECS[1]
    assert [region.globe for region in spec.regions(1, 2)] == [
        Box((4, 0), (4, 6)), Box((10, 0), (2, 6)), Box((14, 0), (2, 6)),
    ]  # fmt: skip
    assert [region.local for region in spec.regions(1, 2)] == [
        Box((0, 0), (4, 6)), Box((4, 0), (2, 6)), Box((6, 0), (2, 6)),
    ]  # fmt: skip


def test_padding_rows_belong_to_nobody() -> None:
    spec = SPECS[4]
    assert spec.local_shape(4) == (4, 3)
    assert [region.globe for region in spec.regions(2, 4)] == [Box((8, 0), (1, 3))]
    assert spec.regions(3, 4) == []


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pieces_of_whole_tensors_and_of_flat_cuts_agree(spec: ParamSpec, tp: int) -> None:
    if tp == 4 and spec.name == "replicated":
        tp = 1
    draw = random.Random(str((spec.name, tp)))
    for _ in range(20):
        whole, flat = torch.full(spec.shape, -1.0), torch.full(spec.shape, -2.0)
        for rank in range(tp if spec.split else 1):
            local = torch.rand(spec.local_shape(tp))
            for piece in spec.pieces(local, rank, tp):
                whole[piece.box.slices()] = piece.tensor
            cuts = sorted(draw.randint(0, local.numel()) for _ in range(3))
            for start, stop in zip([0, *cuts], [*cuts, local.numel()], strict=True):
                for piece in spec.flat_pieces(local.reshape(-1)[start:stop], start, rank, tp):
                    assert (flat[piece.box.slices()] == -2.0).all(), "an element came twice"
                    flat[piece.box.slices()] = piece.tensor
        assert torch.equal(whole, flat)
        assert (flat >= 0).all(), "an element never came"


def test_flat_ranges_of_any_shape_are_cut_into_boxes_in_order() -> None:
    draw = random.Random(1)
    for _ in range(300):
        shape = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 3)))
        size = math.prod(shape)
        start = draw.randint(0, size)
        stop = draw.randint(start, size)
        numbers = torch.arange(size).view(shape)
        boxes = [numbers[box.slices()].reshape(-1) for box in flat_boxes(shape, start, stop)]
        found = torch.cat(boxes) if boxes else torch.empty(0, dtype=torch.int64)
        assert torch.equal(found, torch.arange(start, stop))
        assert len(boxes) <= 2 * len(shape) - 1
