"""Liger's kernels behind the table's signatures, through stand-ins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron_ds.kernels import liger
from megatron_ds.kernels.installed import trouble
from tests.kernels import stand_ins
from tests.kernels.stand_ins import install


@pytest.fixture(autouse=True)
def liger_is_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    trouble.cache_clear()
    install(monkeypatch, "triton")
    norms = {"LigerRMSNormFunction": stand_ins.LigerRMSNormFunction}
    install(monkeypatch, "liger_kernel.ops.rms_norm", **norms)
    install(
        monkeypatch,
        "liger_kernel.ops.swiglu",
        LigerFusedGateUpSiLUMulFunction=stand_ins.LigerFusedGateUpSiLUMulFunction,
    )
    yield
    trouble.cache_clear()


def test_rms_norm_rounds_once_and_leaves_gradients_alone() -> None:
    assert liger.lacks("rms_norm") is None
    torch.manual_seed(0)
    x, weight = (torch.randn(n).bfloat16().requires_grad_() for n in ((6, 4, 33), (33,)))
    upstream = torch.randn(6, 4, 33).bfloat16()
    before = upstream.clone()
    out = liger.rms_norm(x, weight, None, 1e-2)
    out.backward(upstream)
    assert torch.equal(upstream, before)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    true = F.rms_norm(wide[0], (33,), wide[1], 1e-2)
    true.backward(before.double())
    # Half a unit in the last place of bf16: the weight is applied before rounding.
    assert ((out.double() - true).abs() <= 0.5001 * 2**-7 * true.abs()).all()
    for leaf, exact in zip((x, weight), wide, strict=True):
        assert leaf.grad is not None and exact.grad is not None
        assert (leaf.grad.double() - exact.grad).norm() < 5e-3 * exact.grad.norm()


@pytest.mark.parametrize("biased", [True, False])
def test_swiglu_takes_the_gate_first(biased: bool) -> None:
    assert liger.lacks("swiglu") is None
    torch.manual_seed(0)
    x, bias = (torch.randn(n).requires_grad_() for n in ((5, 3, 14), (14,)))
    upstream = torch.randn(5, 3, 7)
    out = liger.swiglu(x, bias if biased else None)
    out.backward(upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    y = wide[0] + wide[1] if biased else wide[0]
    true = F.silu(y[..., :7]) * y[..., 7:]
    true.backward(upstream.double())
    assert torch.allclose(out.double(), true, atol=1e-6)
    for leaf, exact in zip((x, bias) if biased else (x,), wide, strict=False):
        assert leaf.grad is not None and exact.grad is not None
        assert torch.allclose(leaf.grad.double(), exact.grad, atol=1e-5)


def test_an_older_liger_lacks_the_joint_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "liger_kernel.ops.swiglu")
    assert liger.lacks("swiglu") == "this Liger has no LigerFusedGateUpSiLUMulFunction yet"
