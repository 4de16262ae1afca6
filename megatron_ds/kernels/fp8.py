"""Products of linear layers in FP8, through torch's scaled matmul.

Note [Scales of now]
    Both operands of a product are cast as it is made: each is multiplied by the largest number of the format over its
    own largest magnitude, and the sum of products is multiplied by what undoes both. `tensorwise` has one scale per
    matrix. `rowwise` has one per row of the left and per column of the right operand, rounded down to a power of two,
    so that a number has the same digits whether its row or its column was scaled.
    An operand that holds inf or nan gets a scale that makes the result not finite: overflow stays visible.

The kernels read both operands along the dim that is summed over; so every operand is made as a contiguous matrix whose
last dim is that one, transposed on the way if need be.

Source: Micikevicius et al. 2022, arXiv:2209.05433
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from megatron_ds.kernels.flex import can_compile
from megatron_ds.kernels.products import Products

Tensor = torch.Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GRADIENTS = {"e4m3": E4M3, "hybrid": E5M2}
"""What a format casts output gradients to; inputs and weights are e4m3 in both."""
RECIPES = ("tensorwise", "rowwise")
MULTIPLE = 16
"""Of which the kernels on GPUs want the summed dim and the columns; kept on CPUs too, so that both compute the same."""
OLDEST_GPU = (8, 9)
SMALLEST_AMAX = 2.0**-100
"""Stands in for the largest magnitude of zeros; its scale is still finite."""
EXPONENT_BITS = 0x7F800000


class Operand(NamedTuple):
    """A matrix in FP8, contiguous along the dim that is summed over, and what its numbers are to be multiplied with.

    Shapes: values [r, c]; factor [] or [r, 1]
    """

    values: Tensor
    factor: Tensor


def unavailable(device: torch.device) -> str | None:
    """Why a device has no FP8 products; None if it has."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "FP8 products are written for CPUs and NVIDIA's GPUs"
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST_GPU:
        return None
    needed, has = (".".join(map(str, capability)) for capability in (OLDEST_GPU, found))
    return f"FP8 products need a GPU of compute capability {needed}, this one has {has}"


def refuses(shape: tuple[int, int, int]) -> str | None:
    """Why a product [r, n] x [n, c] is not made in FP8; None if it is. `shape` is r, n, c."""
    rows, inner, columns = shape
    if not (rows and inner and columns):
        return "it is empty"
    if inner % MULTIPLE or columns % MULTIPLE:
        return f"the summed dim ({inner}) and the columns ({columns}) must be multiples of {MULTIPLE}"
    return None


def fp8_products(format_: str, recipe: str, plain: Products, device: torch.device) -> Products:
    """Products in FP8; those that FP8 refuses are left to `plain`."""
    assert recipe in RECIPES, recipe
    fp8 = _Fp8(GRADIENTS[format_], recipe == "rowwise", plain, can_compile(device))
    return Products(fp8.forward, fp8.grad_input, fp8.grad_weight, fp8.add_grad_weight)


def cast(x: Tensor, dtype: torch.dtype, by_row: bool) -> Operand:
    """x in FP8, scaled as a whole or row by row.

    Shapes: x [r, c], any strides
    """
    scale = _scale(x.abs().amax(1, keepdim=True) if by_row else x.abs().amax(), dtype, by_row)
    return Operand((x.float() * scale).to(dtype).contiguous(), scale.reciprocal())


def cast_both_ways(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Operand, Operand]:
    """x and its transpose in FP8; scaled as a whole they share the scale.

    Shapes: x [r, c], any strides -> [r, c], [c, r]
    """
    rows = cast(x, dtype, by_row)
    return rows, cast(x.t(), dtype, by_row) if by_row else Operand(rows.values.t().contiguous(), rows.factor)


def _scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    # In fp64, so that compiled code, whose fp32 division is not exact, finds the same scale.
    scale = (torch.finfo(dtype).max / amax.double().clamp(min=SMALLEST_AMAX)).float()
    if power_of_two:
        # Without its digits a nan would pass for inf, whose reciprocal is a number. (nan * 0 will not do: compilers
        # make 0 of it.)
        rounded = (scale.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
        scale = torch.where(scale.isnan(), scale, rounded)
    return scale


def multiply(
    left: Operand, right: Operand, dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False
) -> Tensor:
    """left right^T + bias, summed in fp32; fast: GPUs may sum with fewer bits.

    Shapes: left [r, n], right [c, n], bias [c] -> [r, c]
    """
    # By rows, all versions of torch on all GPUs write bf16 only; a bias is added in the kernel by none in fp32.
    by_row = left.factor.dim() == 2
    written = torch.bfloat16 if by_row else dtype
    fused = bias is not None and not by_row and written == bias.dtype != torch.float32
    out = torch._scaled_mm(
        left.values,
        right.values.t(),
        scale_a=left.factor,
        scale_b=right.factor.t() if by_row else right.factor,
        bias=bias if fused else None,
        out_dtype=written,
        use_fast_accum=fast,
    ).to(dtype)
    return out if bias is None or fused else out.add_(bias)


class _Kept:
    """The transpose of the gradient that was cast last, for as long as that gradient lives."""

    def __init__(self) -> None:
        self.of: weakref.ref[Tensor] | None = None
        self.transposed: Operand | None = None
        self.version = 0

    def put(self, grad: Tensor, transposed: Operand) -> None:
        self.of, self.version, self.transposed = weakref.ref(grad, self._forget), grad._version, transposed

    def take(self, grad: Tensor) -> Operand | None:
        same = self.of is not None and self.of() is grad and self.version == grad._version
        found, self.transposed = (self.transposed if same else None), None
        return found

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if gone is self.of:
            self.of = self.transposed = None


class _Fp8:
    """The products of `Products`; x [n, i], weight [o, i], grad [n, o]."""

    def __init__(self, gradients: torch.dtype, by_row: bool, plain: Products, compiles: bool):
        self.gradients, self.by_row, self.plain, self.compiles = gradients, by_row, plain, compiles
        self.kept = _Kept()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if refuses((*x.shape, len(weight))):
            return self.plain.forward(x, weight, bias)
        return multiply(self._cast(x, E4M3), self._cast(weight, E4M3), x.dtype, bias, fast=True)

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        if refuses((*grad.shape, weight.shape[1])):
            return self.plain.grad_input(grad, weight)
        return multiply(self._cast_grad(grad), self._cast(weight.t(), E4M3), grad.dtype)

    def grad_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        if refuses(_of_weight(grad, x)):
            return self.plain.grad_weight(grad, x)
        return self._grad_weight(grad, x, x.dtype)

    def add_grad_weight(self, total: Tensor, grad: Tensor, x: Tensor, beta: int) -> None:
        if refuses(_of_weight(grad, x)):
            return self.plain.add_grad_weight(total, grad, x, beta)
        part = self._grad_weight(grad, x, total.dtype)
        total.add_(part) if beta else total.copy_(part)

    def _grad_weight(self, grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        kept = None if torch.compiler.is_compiling() else self.kept.take(grad)
        return multiply(kept or self._cast(grad.t(), self.gradients), self._cast(x.t(), E4M3), dtype)

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Operand:
        found: Operand = _maybe_compiled(cast, self.compiles)(x, dtype, self.by_row)
        return found

    def _cast_grad(self, grad: Tensor) -> Operand:
        """The gradient for dX; what dW, which mostly comes next, needs of it is kept: so it is read once for both."""
        if torch.compiler.is_compiling() or refuses((grad.shape[1], len(grad), MULTIPLE)):
            return self._cast(grad, self.gradients)
        rows, transposed = _maybe_compiled(cast_both_ways, self.compiles)(grad, self.gradients, self.by_row)
        self.kept.put(grad, transposed)
        found: Operand = rows
        return found


def _of_weight(grad: Tensor, x: Tensor) -> tuple[int, int, int]:
    """Rows, summed dim and columns of grad^T x."""
    return grad.shape[1], len(grad), x.shape[1]


def _maybe_compiled(function: Callable[..., Any], compiles: bool) -> Callable[..., Any]:
    return _compiled(function) if compiles else function


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for all shapes, compiled at the first call."""
    return torch.compile(function, dynamic=True, fullgraph=True)
