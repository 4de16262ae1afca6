"""What is predicted for GPUs, on paper, against what their kernels keep by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_ds.kernels import activation, norm
from megatron_ds.pipeline.schedule import Kind
from megatron_ds.training.costs import on_paper
from tests.parity.harness import RECIPE, STYLES, arguments
from tests.training.test_costs import BF16, BSH, HEADS, B, H, S, planned


@pytest.mark.parametrize(("flags", "f"), [("", 4 * H), ("--swiglu --ffn-hidden-size 192", 3 * H)])
def test_a_gpu_keeps_what_its_kernels_keep(flags: str, f: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits: 18 s b h for norms, attention and two masks of dropout, what the MLP's first matrix gives, and what
    its second takes; on paper the statistics of norms have 16 bits too. Nothing that is made for CPUs is called."""
    for kernel in (activation._WithSlope, norm._LayerNorm):
        monkeypatch.setattr(kernel, "apply", None)
    model = "--pipeline-model-parallel-size 4 --bf16 --hidden-dropout 0.1 --ffn-hidden-size 256 "
    run = planned(arguments(STYLES["gpt2"], *(model + flags).split()), 4)
    paper = on_paper(dataclasses.replace(run, device=torch.device("cuda")), RECIPE, 1)
    wide = (2 if "swiglu" in flags else 1) * f
    statistics = (4 * HEADS + 2 * 2 * BF16) * S * B
    assert paper.chunks[0].keeps[Kind.F] == 18 * BSH + BF16 * S * B * (wide + f) + statistics
