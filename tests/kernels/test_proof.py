"""The trial of a kernel: true ones pass, and each way of being wrong is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ds.kernels import adamw, proof
from megatron_ds.kernels.attention import attention, torch_attention
from megatron_ds.kernels.choose import OFFERS, OPERATIONS, REFERENCE
from megatron_ds.kernels.mask import visible
from megatron_ds.kernels.proof import TOLERANCE, Attending

CPU = torch.device("cpu")
Tensor = torch.Tensor


def verdict(operation: str, kernel: Any, dtype: torch.dtype = torch.float32) -> str | None:
    return proof.disagreement(operation, kernel, REFERENCE[operation], CPU, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_torchs_own_pass(operation: str, dtype: torch.dtype) -> None:
    assert verdict(operation, OFFERS["torch"](CPU).makers[operation](), dtype) is None


def test_every_operation_has_a_case() -> None:
    assert set(proof.CASES) == {*OPERATIONS, "attention", "causal attention"} and set(REFERENCE) == set(OPERATIONS)


class Off(torch.autograd.Function):
    """x forward; backward a gradient that is a little too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.2


def changed(operation: str, change: Callable[[Tensor], Tensor]) -> Any:
    """The reference, with its (first) output changed."""
    true = REFERENCE[operation]
    if operation == "activations":
        return {**true, "swiglu": lambda x, bias: change(true["swiglu"](x, bias))}
    if operation == "cross_entropy":
        return true._replace(gradient=lambda *inputs: change(true.gradient(*inputs)))
    if operation == "linear":
        return true._replace(grad_input=lambda *inputs: change(true.grad_input(*inputs)))
    return lambda *inputs: change(true(*inputs))


DIFFERENTIABLE = [name for name in OPERATIONS if name not in ("adamw", "cross_entropy", "linear")]
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "too large": (lambda y: y * 1.2, "disagrees here"),
    "not a number": (lambda y: torch.where(y == y.max(), torch.nan, y), "disagrees here"),
    "another precision": (lambda y: y.double(), "gives torch.float64"),
    "another shape": (lambda y: y[:1], "gives torch"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "adamw"])
def test_wrong_outputs_are_seen(operation: str, change: str) -> None:
    spoil, expected = CHANGES[change]
    dtypes = (torch.float32,) if change == "another shape" else TOLERANCE
    for dtype in dtypes:
        said = verdict(operation, changed(operation, spoil), dtype)
        assert said is not None and (said.startswith(expected) or "fails here" in said)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_wrong_gradients_are_seen(operation: str, dtype: torch.dtype) -> None:
    said = verdict(operation, changed(operation, Off.apply), dtype)
    assert said is not None and said.startswith("disagrees here")


def spoiled_adamw(**changes: Any) -> adamw.AdamW:
    def kernel(parts: Any, step: Tensor, scale: Tensor, hyper: adamw.Hyper) -> None:
        step = step + changes.get("steps", 0)
        scale = scale * changes.get("scale", 1)
        hyper = hyper._replace(**{name: value for name, value in changes.items() if name in hyper._fields})
        adamw.reference(parts, step, scale, hyper)

    return kernel


@pytest.mark.parametrize(
    "changes", [{"steps": 1}, {"scale": 1.01}, {"weight_decay": 0.0}, {"beta2": 0.951}, {"beta1": 0.901}, {"lr": 0.101}]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_small_mistakes_of_adamw_are_seen(changes: dict[str, float], dtype: torch.dtype) -> None:
    """Its state is fp32 whatever the model is, and so is the tolerance."""
    assert verdict("adamw", spoiled_adamw(), dtype) is None
    said = verdict("adamw", spoiled_adamw(**changes), dtype)
    assert said is not None and said.startswith("disagrees here")


def test_an_adamw_that_does_not_skip_is_seen() -> None:
    def kernel(parts: Any, step: Tensor, scale: Tensor, hyper: adamw.Hyper) -> None:
        adamw.reference(parts, step, scale + (scale == 0), hyper)

    said = verdict("adamw", kernel)
    assert said is not None and said.endswith("by nan")


@pytest.mark.parametrize("kept", [0.0, 0.75, 1.0])
def test_dropout_of_another_share_is_seen(kept: float) -> None:
    def kernel(x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float) -> Tensor:
        if not dropout:
            return REFERENCE["bias_dropout_add"](x, bias, residual, 0.0)
        return residual + x * (torch.rand(x.shape) < kept) * 2

    assert verdict("bias_dropout_add", kernel) is not None


def test_a_gradient_of_another_dropout_is_seen() -> None:
    class Forgets(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
            return torch.nn.functional.dropout(x, p)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return torch.nn.functional.dropout(grad, 0.5), None

    def kernel(x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float) -> Tensor:
        if not dropout:
            return REFERENCE["bias_dropout_add"](x, bias, residual, 0.0)
        return residual + Forgets.apply(x, dropout)

    assert verdict("bias_dropout_add", kernel) is not None


def test_what_raises_is_told_in_a_line() -> None:
    def kernel(*inputs: Any) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image\nCompile with ...")

    assert verdict("rope", kernel) == "fails here: RuntimeError: CUDA error: no kernel image"

    def silent(*inputs: Any) -> Tensor:
        raise NotImplementedError

    assert verdict("rope", silent) == "fails here: NotImplementedError: ?"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_is_tried_with_and_without_documents(dtype: torch.dtype) -> None:
    right = Attending(visible, torch_attention, 24)

    def tried(mask: Any, call: Any) -> str | None:
        return proof.disagreement("attention", Attending(mask, call, 24), right, CPU, dtype)

    assert tried(visible, attention) is None
    assert tried(lambda rule: None, attention) is not None, "documents are not told apart"
    assert tried(visible, lambda q, k, v, mask, pattern, p: attention(q, k, v, mask, pattern._replace(scale=0.1), p))
    plain = Attending(lambda rule: None, attention, 24)
    assert proof.disagreement("causal attention", plain, right, CPU, dtype) is None


def test_attention_is_tried_with_a_bias_that_is_learned() -> None:
    right = Attending(visible, torch_attention, 24)

    def tried(change: Callable[[Tensor], Tensor]) -> str | None:
        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
            learned = mask is not None and mask.requires_grad
            return attention(q, k, v, change(mask) if learned else mask, *rest)

        return proof.disagreement("attention", Attending(visible, call, 24), right, CPU, torch.float32)

    assert tried(lambda mask: mask * 1) is None
    assert (tried(Off.apply) or "").startswith("disagrees here"), "its gradient"
    assert (tried(lambda mask: mask.detach()) or "").startswith("fails here"), "no gradient, as cuDNN has none"


def spoiled_where(wrong: Callable[..., bool], operation: str) -> Any:
    """The reference, a little off for some inputs."""
    true = REFERENCE[operation]
    return lambda *inputs: true(*inputs) * (1.2 if wrong(*inputs) else 1.0)


@pytest.mark.parametrize("operation", ["layer_norm", "rms_norm"])
def test_norms_are_tried_at_the_runs_size_and_on_an_fp32_residual(operation: str) -> None:
    half = torch.bfloat16
    wide = spoiled_where(lambda x, weight, bias, eps: x.dtype == weight.dtype == torch.float32, operation)
    assert (verdict(operation, wide, half) or "").startswith("disagrees here")
    broad = spoiled_where(lambda x, weight, bias, eps: x.shape[-1] == len(weight) == 513, operation)
    assert verdict(operation, broad, half) is None
    assert proof.disagreement(operation, broad, REFERENCE[operation], CPU, half, 513) is not None


def test_softmax_is_tried_with_a_mask() -> None:
    masked = spoiled_where(lambda scores, mask, scale, causal: mask is not None, "softmax")
    assert (verdict("softmax", masked) or "").startswith("disagrees here")

    def unseen(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        out = REFERENCE["softmax"](scores, mask, scale, causal)
        return out if mask is None else torch.where(mask.any(-1, keepdim=True), out, 1 / scores.shape[-1])

    assert (verdict("softmax", unseen) or "").startswith("disagrees here"), "queries that see nothing"


def test_branches_are_tried_beside_an_fp32_residual() -> None:
    def kernel(x: Tensor, bias: Tensor | None, residual: Tensor, dropout: float) -> Tensor:
        return REFERENCE["bias_dropout_add"](x, bias, residual, dropout).to(x.dtype)

    assert (verdict("bias_dropout_add", kernel, torch.bfloat16) or "").startswith("gives torch.bfloat16")


def test_bf16_totals_and_gradients_are_tried_in_a_bf16_run() -> None:
    """Of --grad-reduce-in-bf16; in no other run, where a kernel may have none."""

    def add(total: Tensor, grad: Tensor, x: Tensor, beta: int) -> None:
        assert total.dtype == torch.float32
        total.addmm_(grad.float().t(), x.float(), beta=beta)

    def step(parts: Any, number: Tensor, scale: Tensor, hyper: adamw.Hyper) -> None:
        assert all(part.grad.dtype == torch.float32 for part in parts)
        adamw.reference(parts, number, scale, hyper)

    for operation, kernel in (("linear", REFERENCE["linear"]._replace(add_grad_weight=add)), ("adamw", step)):
        assert verdict(operation, kernel, torch.float32) is None
        assert (verdict(operation, kernel, torch.bfloat16) or "").startswith("fails here: AssertionError")
    assert verdict("adamw", step, torch.float16) is None


def test_a_run_draws_the_same_numbers_after_a_trial() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert verdict("bias_dropout_add", REFERENCE["bias_dropout_add"]) is None
    assert torch.equal(torch.rand(3), expected)
