"""Axes, groups and collectives on real ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.parallel import collectives, context
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.parallel.context import Axis, coordinates
from megatron_ds.parallel.rng import DropoutStreams
from tests.helpers.ranks import run_ranks

SIZES = {"pp": 2, "dp": 2, "cp": 1, "tp": 2}


def test_tensor_parallel_ranks_are_neighbours_and_stages_lie_far_apart() -> None:
    assert [coordinates(rank, SIZES)["tp"] for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [coordinates(rank, SIZES)["dp"] for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [coordinates(rank, SIZES)["pp"] for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_an_axis_without_a_group_refuses_to_mean_the_world() -> None:
    with pytest.raises(RuntimeError, match="axis dp"):
        _ = Axis("dp", 2, 0).group


def members() -> dict[str, list[int]]:
    """The global ranks that each axis of this rank connects, by asking them."""
    parallel = context.start(ParallelConfig(), SIZES, torch.device("cpu"))
    found = {}
    for name in ("pp", "dp", "cp", "tp", "world", "embedding"):
        axis = getattr(parallel, name)
        mine = torch.zeros(8)
        mine[parallel.world.rank] = 1
        found[name] = collectives.all_reduce(mine, axis).nonzero().flatten().tolist()
    payloads = collectives.gather_bytes(b"x" * parallel.world.rank, parallel.world)
    assert payloads == [b"x" * rank for rank in range(8)]
    context.stop()
    return found


def test_every_axis_connects_the_ranks_of_the_mesh() -> None:
    found = run_ranks(members, 8)
    assert found[5] == {
        "pp": [1, 5], "dp": [5, 7], "cp": [5], "tp": [4, 5], "world": list(range(8)), "embedding": [1, 5],
    }  # fmt: skip


def partial_results() -> tuple[float, float]:
    """Forward and backward of g (reduce) on rank-dependent values."""
    parallel = context.start(ParallelConfig(), {"pp": 1, "dp": 1, "cp": 1, "tp": 2}, torch.device("cpu"))
    tp = parallel.tp
    y = torch.tensor([1.0], requires_grad=True)
    summed = collectives.reduce_from(y * (tp.rank + 1), tp)
    (summed * 5).backward()
    assert y.grad is not None
    context.stop()
    return summed.item(), y.grad.item()


def test_reduce_sums_values_and_passes_gradients_on() -> None:
    assert run_ranks(partial_results, 2) == [(3.0, 5.0), (3.0, 10.0)]


def test_a_dropout_mask_is_a_function_of_its_names() -> None:
    def draw(sample: int, layer: int, site: str, part: object = 0) -> torch.Tensor:
        DropoutStreams(1234, sample).enter(layer, site, part)
        return torch.rand(4)

    first = draw(8, 3, "mlp")
    torch.rand(100)
    assert torch.equal(first, draw(8, 3, "mlp")), "what ran before must not matter"
    for other in (draw(9, 3, "mlp"), draw(8, 4, "mlp"), draw(8, 3, "proj"), draw(8, 3, "mlp", 1)):
        assert not torch.equal(first, other)
