"""A kernel is tried on the device before it is chosen: it must run, and agree with the reference, there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from megatron_ds.kernels.adamw import Hyper, Part
from megatron_ds.kernels.attention import Attention, Pattern
from megatron_ds.kernels.mask import Mask, Rule
from megatron_ds.kernels.rope import rope_frequencies, rope_table

Tensor = torch.Tensor
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Of the largest difference, beside the largest value; by what a tensor is kept in."""


class Attending(NamedTuple):
    """An attention, what makes its masks, and a size of heads."""

    mask: Callable[[Rule], Mask | None]
    attention: Attention
    head_size: int


class Make(NamedTuple):
    """Makes inputs that are the same at every call."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator
    hidden_size: int

    def __call__(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers.

        Shapes: -> shape
        """
        values = torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)
        return values.requires_grad_(grad)


def disagreement(
    operation: str, kernel: Any, reference: Any, device: torch.device, dtype: torch.dtype, hidden_size: int = 96
) -> str | None:
    """What is wrong with a kernel of an operation on this device, None if nothing is."""
    case = CASES[operation]
    # A run's own random numbers are not to depend on what was tried before it.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            found = case(kernel, _make(device, dtype, hidden_size))
        except Exception as error:  # other people's code, compilers and drivers: anything may come
            return failure(error)
        expected = case(reference, _make(device, dtype, hidden_size))
    for mine, right in zip(found, expected, strict=True):
        if (mine.shape, mine.dtype) != (right.shape, right.dtype):
            return f"gives {mine.dtype} {list(mine.shape)}, the reference {right.dtype} {list(right.shape)}"
        off = (mine.double() - right.double()).abs().max().item()
        if not off <= TOLERANCE[mine.dtype] * max(1.0, right.double().abs().max().item()):
            return f"disagrees here with the reference by {off:.1e}"
    return None


def failure(error: Exception) -> str:
    """An error in one line."""
    return f"fails here: {type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}"


def _make(device: torch.device, dtype: torch.dtype, hidden_size: int) -> Make:
    return Make(device, dtype, torch.Generator().manual_seed(0), hidden_size)


def _there_and_back(call: Callable[..., Tensor], *inputs: Any) -> list[Tensor]:
    """The output and the gradients of all inputs that have one."""
    out = call(*inputs)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    # Of all sizes within a row: a softmax or a norm hands on nothing of what is the same in all of it.
    weights = torch.arange(out.numel(), device=out.device).mul(2.0).sin().mul(2.0).to(out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, weights)]


def _layer_norm(kernel: Any, make: Make) -> list[Tensor]:
    return _norm(kernel, make, True)


def _rms_norm(kernel: Any, make: Make) -> list[Tensor]:
    return _norm(kernel, make, False)


def _norm(kernel: Any, make: Make, has_bias: bool) -> list[Tensor]:
    """In the parameters' precision, and all in fp32, as norms of an fp32 residual stream are computed."""
    h, out = make.hidden_size, []
    for dtype in dict.fromkeys((make.dtype, torch.float32)):
        x, weight, bias = make(6, 2, h, dtype=dtype), make(h, dtype=dtype), make(h, dtype=dtype)
        out += _there_and_back(kernel, x, weight, bias if has_bias else None, 1e-5)
    return out


def _activations(kernel: Mapping[str, Any], make: Make) -> list[Tensor]:
    parts = [_there_and_back(kernel[name], make(6, 2, 96), make(96)) for name in ("gelu_tanh", "gelu", "swiglu")]
    return [tensor for part in parts for tensor in part]


def _rope(kernel: Any, make: Make) -> list[Tensor]:
    positions = torch.arange(6, device=make.device).unsqueeze(1).expand(6, 2)
    table = rope_table(positions, rope_frequencies(16, 100.0).to(make.device), make.dtype)
    return _there_and_back(kernel, make(6, 2, 3, 32), table)


def _bias_dropout_add(kernel: Any, make: Make) -> list[Tensor]:
    whole = _there_and_back(kernel, make(6, 2, 96), make(96), make(6, 2, 96), 0.0)
    # Without a bias: the reference rounds x + bias to x's precision, others need not.
    whole += _there_and_back(kernel, make(6, 2, 96), None, make(6, 2, 96, dtype=torch.float32), 0.0)
    # What is dropped differs from kernel to kernel; of ones a half is dropped and the rest doubled, there as back.
    ones = make(6, 2, 96).detach().fill_(1).requires_grad_()
    out = kernel(ones, None, torch.zeros_like(ones), 0.5)
    (grad,) = torch.autograd.grad(out, ones, torch.ones_like(out))
    dropped = (out == 0).float().mean()
    return [*whole, out.detach() * (2 - out.detach()), grad - out.detach(), ((dropped - 0.5).abs() < 0.1).float()]


def _cross_entropy(kernel: Any, make: Make) -> list[Tensor]:
    logits = make(7, 100, grad=False)
    column = torch.tensor([0, 3, -1, 89, 50, 1, 2], device=make.device)
    log_sum, target = kernel.statistics(logits, column, 90)
    upstream = make(7, grad=False, dtype=torch.float32)
    return [log_sum, target, kernel.gradient(logits, column, 90, log_sum, log_sum + 0.5, upstream)]


def _softmax(kernel: Any, make: Make) -> list[Tensor]:
    hidden = make(2, 1, 8, 8, grad=False) > 0.5
    hidden[0, 0, 3] = True  # a query that sees nothing
    whole = _there_and_back(kernel, make(2, 3, 8, 8), None, 0.5, True)
    return [*whole, *_there_and_back(kernel, make(2, 3, 8, 8), ~hidden, 0.5, False)]


def _adamw(kernel: Any, make: Make) -> list[Tensor]:
    parts = []
    # bf16 gradients come with a model in bf16 only.
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (make.dtype == torch.bfloat16)]:
        master, grad, exp_avg, exp_avg_sq = (make(1000, grad=False, dtype=torch.float32) for _ in range(4))
        model = None if make.dtype == torch.float32 else make(1000, grad=False)
        parts.append(Part(master, grad.to(dtype), exp_avg, exp_avg_sq.abs_(), model))
    scalars = torch.tensor([3.0, 0.5], device=make.device)
    hyper = Hyper(lr=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    kernel(parts, scalars[0], scalars[1], hyper)
    spoiled = [part._replace(grad=torch.full_like(part.grad, torch.nan)) for part in parts]
    kernel(spoiled, scalars[0], scalars[1] * 0, hyper)
    return [t for p in parts for t in (p.master, p.exp_avg, p.exp_avg_sq, p.model) if t is not None]


def _linear(kernel: Any, make: Make) -> list[Tensor]:
    x, weight, grad = make(32, 64, grad=False), make(48, 64, grad=False), make(32, 48, grad=False)
    total = make(48, 64, grad=False, dtype=torch.float32)
    written = torch.full_like(total, torch.nan)
    kernel.add_grad_weight(written, grad, x, 0)
    narrow = make(48, 64, grad=False)  # of --grad-reduce-in-bf16
    for each in (total, narrow):
        kernel.add_grad_weight(each, grad, x, 1)
    total, written = total.to(make.dtype), written.to(make.dtype)  # the reference rounds to that before it adds
    made = [kernel.forward(x, weight, None), kernel.grad_input(grad, weight), kernel.grad_weight(grad, x)]
    return [total, written, narrow, *made]


def _attention(kernel: Attending, make: Make) -> list[Tensor]:
    """Later keys hidden; documents hidden from each other; a bias that is learned, as T5's is."""
    documents = torch.tensor([[0] * 20 + [1] * 28, [0] * 48], device=make.device)
    out = _causal_attention(kernel, make)
    mask = kernel.mask(Rule(48, 48, True, None, documents, documents, make.device))
    out += _there_and_back(kernel.attention, *_heads(kernel, make, 2), mask, Pattern(), 0.0)
    bias = make(1, 4, 48, 48)
    return out + _there_and_back(kernel.attention, *_heads(kernel, make, 4), bias, Pattern(False), 0.0)


def _causal_attention(kernel: Attending, make: Make) -> list[Tensor]:
    mask = kernel.mask(Rule(48, 48, True))
    return _there_and_back(kernel.attention, *_heads(kernel, make, 2), mask, Pattern(), 0.0)


def _heads(kernel: Attending, make: Make, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (make(48, 2, heads, kernel.head_size) for heads in (4, shared, shared))
    return q, k, v


CASES: Mapping[str, Callable[[Any, Make], list[Tensor]]] = MappingProxyType(
    {
        "layer_norm": _layer_norm,
        "rms_norm": _rms_norm,
        "activations": _activations,
        "rope": _rope,
        "bias_dropout_add": _bias_dropout_add,
        "cross_entropy": _cross_entropy,
        "softmax": _softmax,
        "adamw": _adamw,
        "linear": _linear,
        "attention": _attention,
        "causal attention": _causal_attention,
    }
)
