"""apex's kernels behind the table's signatures, through stand-ins that demand what its sources demand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron_ds.kernels import apex
from megatron_ds.kernels.adamw import Hyper
from megatron_ds.kernels.installed import trouble
from tests.kernels import stand_ins
from tests.kernels.stand_ins import install

EPS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    trouble.cache_clear()
    yield
    trouble.cache_clear()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.double() - expected.double()).norm() < EPS[found.dtype] * expected.double().norm() + 1e-12


def run(function: Callable[..., torch.Tensor], dtype: torch.dtype, *inputs: torch.Tensor | None) -> list[torch.Tensor]:
    """The result and the inputs' gradients."""
    own = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in inputs]
    out = function(*own)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype))
    return [out.detach(), *(t.grad for t in own if t is not None and t.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    install(monkeypatch, "apex.normalization.fused_layer_norm", **stand_ins.apex_norms())
    install(monkeypatch, "fused_layer_norm_cuda")
    assert apex.lacks("layer_norm") is None and apex.lacks("rms_norm") is None
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 3, 7).to(dtype), torch.randn(7).to(dtype), torch.randn(7).to(dtype)
    for ours, true, inputs in (
        (apex.layer_norm, lambda x, w, b, eps: F.layer_norm(x, (7,), w, b, eps), (x, weight, bias)),
        (apex.layer_norm, lambda x, w, b, eps: F.layer_norm(x, (7,), w, b, eps), (x, weight, None)),
        (apex.rms_norm, lambda x, w, b, eps: F.rms_norm(x, (7,), w, eps), (x, weight, None)),
    ):
        found = run(lambda *t, f=ours: f(*t, 1e-2), dtype, *inputs)
        expected = run(lambda *t, f=true: f(*t, 1e-2), torch.float64, *inputs)
        for a, b in zip(found, expected, strict=True):
            close(a, b)


@pytest.mark.parametrize(
    ("grad_dtype", "model_dtype", "kernel"),
    [
        (torch.float32, None, "capturable"),
        (torch.float32, torch.bfloat16, "capturable"),
        (torch.bfloat16, torch.bfloat16, "capturable_master"),
        (torch.bfloat16, torch.float16, "capturable"),
        (torch.bfloat16, None, "capturable"),
    ],
)
def test_adamw_is_torchs(
    monkeypatch: pytest.MonkeyPatch, grad_dtype: torch.dtype, model_dtype: torch.dtype | None, kernel: str
) -> None:
    calls: list[str] = []
    install(monkeypatch, "amp_C", **stand_ins.amp_c(calls))
    monkeypatch.setattr(apex, "LARGEST", 4)
    assert apex.lacks("adamw") is None
    torch.manual_seed(0)
    sizes, hyper = (5, 0, 8), Hyper(lr=0.1, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-3)
    masters = [torch.randn(n) for n in sizes]
    models = [None if model_dtype is None else torch.zeros(n, dtype=model_dtype) for n in sizes]
    moments = [(torch.zeros(n), torch.zeros(n)) for n in sizes]
    true = [torch.nn.Parameter(t.double()) for t in masters]
    torchs = torch.optim.AdamW(true, lr=0.1, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-3)
    for step in range(1, 4):
        gradients = [torch.randn(n).to(grad_dtype) for n in sizes]
        for parameter, g in zip(true, gradients, strict=True):
            parameter.grad = g.double() * 0.25
        torchs.step()
        parts = [(p, g, m, v, low) for p, g, (m, v), low in zip(masters, gradients, moments, models, strict=True)]
        apex.adamw(parts, torch.tensor(float(step)), torch.tensor(0.25), hyper)
    for master, model, expected in zip(masters, models, true, strict=True):
        close(master, expected.detach())
        if model is not None:
            close(model, expected.detach())
    assert calls == [kernel] * 3


def test_adamw_of_both_kinds_at_once_and_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    install(monkeypatch, "amp_C", **stand_ins.amp_c(calls))
    step, scale = torch.tensor(1.0), torch.tensor(1.0)
    hyper = Hyper(lr=0.5, weight_decay=0.0, beta1=0.9, beta2=0.9, eps=0.0)
    low = torch.zeros(3, dtype=torch.bfloat16)
    wide = (torch.zeros(3), torch.ones(3), torch.zeros(3), torch.zeros(3), None)
    narrow = (torch.zeros(3), torch.ones(3).bfloat16(), torch.zeros(3), torch.zeros(3), low)
    apex.adamw([wide, narrow], step, scale, hyper)
    assert calls == ["capturable", "capturable_master"]
    # The first step of Adam is of length lr.
    close(wide[0], torch.full((3,), -0.5))
    close(low, torch.full((3,), -0.5))
    apex.adamw([], step, scale, hyper)
    assert len(calls) == 2


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_adamw_with_a_scale_of_zero_changes_nothing(monkeypatch: pytest.MonkeyPatch, grad_dtype: torch.dtype) -> None:
    calls: list[str] = []
    install(monkeypatch, "amp_C", **stand_ins.amp_c(calls))
    low = torch.ones(3, dtype=torch.bfloat16)
    kept = torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 3.0), low
    master, m, v, _ = kept
    part = (master, torch.full((3,), torch.nan, dtype=grad_dtype), m, v, low)
    zero = torch.zeros(())
    apex.adamw([part], zero, zero, Hyper(lr=0.5, weight_decay=0.1, beta1=0.9, beta2=0.9, eps=0.0))
    assert calls and [t.tolist() for t in kept] == [[1.0] * 3, [2.0] * 3, [3.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    install(monkeypatch, "fused_weight_gradient_mlp_cuda", wgrad_gemm_accum_fp32=stand_ins.wgrad_gemm_accum_fp32)
    assert apex.lacks("add_product") is None
    torch.manual_seed(0)
    before, grad, x = torch.randn(3, 5), torch.randn(3, 7).to(dtype).t(), torch.randn(7, 5).to(dtype)
    total = before.clone()
    apex.add_product(total, grad, x, 1)
    close(total, before.double() + torch.einsum("no,ni->oi", grad.double(), x.double()))
    apex.add_product(total, grad[:0], x[:0], 1)
    expected = total - before
    apex.add_product(total.fill_(torch.nan), grad, x, 0)
    close(total, expected)
    narrow = before.to(dtype if dtype != torch.float32 else torch.bfloat16)  # --grad-reduce-in-bf16
    expected = narrow.double() + torch.einsum("no,ni->oi", grad.double(), x.double())
    apex.add_product(narrow, grad, x, 1)
    close(narrow, expected)


def unexpected(*_: object) -> torch.Tensor:
    raise AssertionError("handed on")


def softmaxes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "scaled_masked_softmax_cuda", **stand_ins.scaled_masked_softmax())
    install(monkeypatch, "scaled_upper_triang_masked_softmax_cuda", **stand_ins.scaled_upper_triang_masked_softmax())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masks", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_softmax(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masks: int | None, causal: bool) -> None:
    if masks is None and not causal:
        pytest.skip("refused")
    softmaxes(monkeypatch)
    assert apex.lacks("softmax") is None
    torch.manual_seed(0)
    b, a, s = 4, 4, 16
    scores = 3 * torch.randn(b, s, a, s).transpose(1, 2).to(dtype)
    seen = None if masks is None else torch.rand(masks, 1, s, s) < 0.5
    if seen is not None:
        seen[0, 0, 5] = False
    allowed = torch.ones(b, a, s, s, dtype=torch.bool) if seen is None else seen.expand(b, a, s, s)
    allowed = allowed.tril() if causal else allowed

    def by_definition(x: torch.Tensor) -> torch.Tensor:
        weights = (0.25 * x).exp() * allowed
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)

    ours = apex.softmax_or(unexpected)
    found = run(lambda x: ours(x, seen, 0.25, causal), dtype, scores)
    for one, expected in zip(found, run(by_definition, torch.float64, scores), strict=True):
        close(one, expected)


def test_softmax_leaves_the_gradient_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    softmaxes(monkeypatch)
    scores = torch.randn(4, 4, 16, 16).half().requires_grad_()
    upstream = torch.randn(4, 4, 16, 16).half()
    before = upstream.clone()
    apex.softmax_or(unexpected)(scores, None, 1.0, True).backward(upstream)
    assert torch.equal(upstream, before)


def test_softmax_refuses_what_the_kernels_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    softmaxes(monkeypatch)
    half, mask = torch.zeros(2, 8, 16, 16).half(), torch.ones(1, 1, 16, 16, dtype=torch.bool)
    assert apex.refuses(half, None, 1.0, True) is apex.refuses(half, mask, 1.0, False) is None
    for word, arguments in {
        "float32": (half.float(), mask, 1.0, True),
        "rounded": (half, mask, 0.1, True),
        "neither": (half, None, 1.0, False),
        "16 queries and 12 keys": (half[..., :12], None, 1.0, True),
        "heads": (half, mask.expand(1, 8, 16, 16), 1.0, False),
        "multiple of 4": (half[..., :14], mask[..., :14], 1.0, False),
        "24 samples x heads": (half.new_zeros(3, 8, 16, 16), None, 1.0, True),
        "12 queries": (half[:, :, :12], mask[:, :, :12], 1.0, False),
        "5000 keys": (half[..., :1].expand(2, 8, 16, 5000), mask[..., :1].expand(1, 1, 16, 5000), 1.0, False),
    }.items():
        assert word in (apex.refuses(*arguments) or "")
    handed = apex.softmax_or(lambda scores, mask, scale, causal: scores + scale)
    assert handed(half, None, 0.1, True).amax().item() == pytest.approx(0.1, rel=1e-3)


def test_what_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is how Python says that there is no such module.
    for module in ("amp_C", "scaled_upper_triang_masked_softmax_cuda"):
        monkeypatch.setitem(sys.modules, module, None)
    install(monkeypatch, "scaled_masked_softmax_cuda")
    assert apex.lacks("adamw") == "amp_C is not installed"
    assert apex.lacks("softmax") == "scaled_upper_triang_masked_softmax_cuda is not installed"
