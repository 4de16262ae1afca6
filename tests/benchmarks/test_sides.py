"""Every side of a comparison trains one model: ours, plain torch, nanoGPT, transformers, from the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import workloads
from benchmarks.ours import OurStep
from benchmarks.peers_common import save_initial_weights
from benchmarks.peers_single import PEERS, build
from benchmarks.workloads import Workload, random_batch

TINY = {w.model: w for w in (workloads.TINY, workloads.TINY_BERT, workloads.TINY_T5, workloads.TINY_LLAMA)}
SIDES = [(model, side) for model, sides in PEERS.items() for side in sides if "compiled" not in side]


def trained(step: object, workload: Workload) -> list[float]:
    """Losses and gradient norms of three steps."""
    return [n for seed in range(3) for n in (step.step(random_batch(workload, seed)), step.grad_norm)]


@pytest.mark.parametrize(("model", "side"), SIDES)
def test_a_peer_trains_our_model(model: str, side: str, tmp_path: Path) -> None:
    if side == "transformers":
        pytest.importorskip("transformers")
    workload, weights = TINY[model], tmp_path / "weights.pt"
    save_initial_weights(workload, weights, seed=1)
    ours = trained(OurStep(workload, "fp32", "cpu", weights), workload)
    theirs = trained(build(side, workload, torch.float32, "cpu", weights), workload)
    assert theirs == pytest.approx(ours, rel=2e-5)


@pytest.mark.parametrize("model", TINY)
def test_batches(model: str) -> None:
    workload = TINY[model]
    parts = random_batch(workload, 3)
    assert all(len(part) == workload.global_ for part in parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, random_batch(workload, 3), strict=True))
    if model == "bert":
        tokens, _, labels, loss_mask, documents, _ = parts
        masked = loss_mask.bool()
        assert masked.sum(1).unique().numel() == 1 and not (masked & documents.bool()).any()
        assert (labels[masked] > 0).all() and not labels[~masked].any() and not tokens[documents.bool()].any()


def test_parameters_without_weights_are_drawn() -> None:
    workload = TINY["llama"]
    steps = OurStep(workload, "fp32", "cpu"), build("torch", workload, torch.float32, "cpu", None)
    assert steps[0].parameters == steps[1].num_parameters
    for step in steps:
        assert step.step(random_batch(workload)) == pytest.approx(6.24, abs=0.05)  # ln 512
