"""Cutting layers: published partitions, and the best one found by trying all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from megatron_ds.config import parse
from megatron_ds.errors import ConfigError
from megatron_ds.model.chunk import Lengths
from megatron_ds.model.config import TransformerConfig
from megatron_ds.stages import Weights, balance, cut_layers, cut_two_stacks, parameter_weights, share_work, weights


def counts(cut: tuple[tuple[tuple[int, int, bool, bool], ...], ...]) -> list[int]:
    """Layers of each virtual stage, in the order in which a sample passes them; checks that they follow each other."""
    passed = [cut[stage][chunk] for chunk in range(len(cut[0])) for stage in range(len(cut))]
    assert [start for start, *_ in passed] == [0, *(stop for _, stop, *_ in passed[:-1])]
    assert [first for *_, first, _ in passed] == [True] + [False] * (len(passed) - 1)
    assert [last for *_, last in passed] == [False] * (len(passed) - 1) + [True]
    return [stop - start for start, stop, *_ in passed]


def test_equal_shares() -> None:
    assert cut_layers(12, 1) == (((0, 12, True, True),),)
    assert cut_layers(12, 3) == (((0, 4, True, False),), ((4, 8, False, False),), ((8, 12, False, True),))


def test_interleaved_virtual_stage_is_chunk_times_pp_plus_stage() -> None:
    # Megatron's example: 8 layers, 2 stages, 2 layers of a virtual stage -> [0 1 4 5] and [2 3 6 7]
    assert cut_layers(8, 2, 2) == (
        ((0, 2, True, False), (4, 6, False, False)),
        ((2, 4, False, False), (6, 8, False, True)),
    )
    assert counts(cut_layers(24, 4, 3)) == [2] * 12


def test_given_ends() -> None:
    assert counts(cut_layers(10, 4, first=2, last=2)) == [2, 3, 3, 2]
    assert counts(cut_layers(10, 4, first=1)) == [1, 3, 3, 3]
    assert counts(cut_layers(10, 4, last=4)) == [2, 2, 2, 4]
    assert counts(cut_layers(7, 2, first=3, last=4)) == [3, 4]


def test_blooms_partition() -> None:
    # 70 layers, embedding and head as a layer each, 12 stages of 6
    cut = cut_layers(70, 12, method="type:transformer|embedding")
    assert counts(cut) == [5] + [6] * 10 + [5]


def test_methods() -> None:
    assert counts(cut_layers(10, 4, method="uniform")) == [3, 3, 2, 2]
    assert counts(cut_layers(10, 4, method="type:transformer")) == [3, 3, 2, 2]
    assert counts(cut_layers(10, 4, method="type:ParallelTransformerLayerPipe")) == [3, 3, 2, 2]
    assert counts(cut_layers(10, 4, method="TYPE:Transformer|EMBEDDING")) == [2, 3, 3, 2]
    # An embedding as heavy as three layers, a head as one and a half: loads of 4, 4, 4 and 4.5 layers
    assert counts(cut_layers(12, 4, method="parameters", parameters=Weights(60, 20, 30))) == [1, 4, 4, 3]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("type:transformer", (0, 1, 0)),
        ("type:embedding", (1, 0, 1)),
        ("type:transformer|embedding", (1, 1, 1)),
        ("type:transformer|head", (0, 1, 1)),
        ("type:transformer|norm", (0, 1, 1)),
        ("type:transformer|norm|embed", (1, 1, 2)),
        ("type:^Parallel.*Pipe$", (0, 1, 0)),
    ],
)
def test_patterns_look_at_the_names_of_deepspeeds_parts(pattern: str, expected: tuple[int, int, int]) -> None:
    assert weights(pattern) == expected


@pytest.mark.parametrize("method", ["best", "type", "type:(", "type:attention", "profile"])
def test_unknown_methods(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        weights(method)
    assert caught.value.subject == "--pp-partition-method"
    assert method in caught.value.found


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


@pytest.mark.parametrize("parts", [(0, 1, 0), (1, 1, 1), (5, 2, 3), (7, 3, 20), (30, 1, 1), (0, 4, 9), (1, 0, 1)])
def test_balance_finds_the_best_of_all_cuts(parts: tuple[int, int, int]) -> None:
    embedding, layer, head = parts

    def loads(cut: tuple[int, ...]) -> list[int]:
        found = [count * layer for count in cut]
        found[0] += embedding
        found[-1] += head
        return found

    for layers in range(1, 10):
        for stages in range(1, layers + 1):
            best = min(
                (max(loads(cut)), sum(load * load for load in loads(cut))) for cut in compositions(layers, stages)
            )
            found = tuple(balance(layers, stages, Weights(*parts)))
            assert sum(found) == layers
            assert min(found) >= 1
            assert (max(loads(found)), sum(load * load for load in loads(found))) == best


def test_parameters_of_the_parts() -> None:
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 "
    gpt = parse(flags.split()).model
    # 12 h^2 + 13 h with all biases; table and positions; final norm and the tied table
    assert parameter_weights(gpt, 1000, 32) == (1000 * 64 + 32 * 64, 12 * 64**2 + 13 * 64, 1000 * 64 + 2 * 64)
    flags += "--num-key-value-heads 2 --swiglu --ffn-hidden-size 100 --normalization RMSNorm --disable-bias-linear "
    flags += "--position-embedding-type rope"
    llama = parse(flags.split()).model
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100 + 2 * 64
    assert parameter_weights(llama, 1000, 32) == (1000 * 64, layer, 1000 * 64 + 64)


def test_shares_of_work_are_the_best_of_all() -> None:
    rng = random.Random(0)
    for _ in range(60):
        work = [rng.choice((3, 7, 11)) for _ in range(rng.randint(3, 9))]
        parts = rng.randint(1, min(4, len(work)))
        shared = share_work(work, parts)
        assert len(shared) == parts and sum(shared) == len(work) and min(shared) > 0

        def heaviest(stops: tuple[int, ...], work: list[int] = work) -> int:
            edges = (0, *stops, len(work))
            return max(sum(work[a:b]) for a, b in itertools.pairwise(edges))

        best = min(map(heaviest, itertools.combinations(range(1, len(work)), parts - 1)))
        assert heaviest(tuple(itertools.accumulate(shared[:-1]))) == best


def test_two_stacks() -> None:
    t5 = TransformerConfig(
        model_type="T5", encoder_num_layers=6, decoder_num_layers=6, hidden_size=64, num_attention_heads=8
    )
    same = Lengths(32, 32)
    # A decoder layer has a third more to multiply: 4 h^2 of 12 h^2 more.
    assert counts(cut_two_stacks(t5, same, 2)) == [7, 5]
    assert counts(cut_two_stacks(t5, Lengths(512, 64), 2)) == [4, 8]
    assert counts(cut_two_stacks(t5, same, 4, split=1)) == [6, 2, 2, 2]
    assert counts(cut_two_stacks(t5, same, 4, split=2)) == [3, 3, 3, 3]
    assert counts(cut_two_stacks(t5, same, 2, 3, of_chunk=2)) == [2] * 6
    assert len(counts(cut_two_stacks(t5, same, 2, 3))) == 6
