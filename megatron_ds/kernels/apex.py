"""NVIDIA apex's fused kernels behind the table's signatures; for CUDA only.

Source: apex/normalization/fused_layer_norm.py, csrc/multi_tensor_adam.cu, and of csrc/megatron
fused_weight_gradient_dense.cpp, scaled_masked_softmax.h, scaled_upper_triang_masked_softmax.h
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_ds.kernels import products
from megatron_ds.kernels.adamw import Hyper, Part
from megatron_ds.kernels.installed import trouble

Tensor = torch.Tensor
Softmax = Callable[[Tensor, Tensor | None, float, bool], Tensor]
LARGEST = 2**30
"""Elements of one tensor that multi_tensor_adam_capturable is given: it counts them in 32 bits."""
CHUNK = 2**16
"""Elements of one block of threads, as apex.multi_tensor_apply has it."""


def lacks(operation: str) -> str | None:
    """Why an operation of this module cannot be used here; None where it can."""
    needed = {
        "layer_norm": ("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"),
        "rms_norm": ("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"),
        "adamw": ("amp_C",),
        "add_product": ("fused_weight_gradient_mlp_cuda",),
        "softmax": ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda"),
    }[operation]
    return next((why for module in needed if (why := trouble(module)) is not None), None)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As kernels/norm.py's.

    Shapes: x [..., h] -> [..., h]
    """
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    shift = torch.zeros_like(weight, requires_grad=False) if bias is None else bias
    out: Tensor = norms.fused_layer_norm_affine(x, weight, shift, tuple(weight.shape), eps)
    return out


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As kernels/norm.py's.

    Shapes: x [..., h] -> [..., h]
    """
    assert bias is None
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    out: Tensor = norms.fused_rms_norm_affine(x, weight, tuple(weight.shape), eps)
    return out


def adamw(parts: Sequence[Part], step: Tensor, scale: Tensor, hyper: Hyper) -> None:
    """AdamW in place, gradients times `scale` first; step and scale stay on the device.

    Where gradient and model share a precision one kernel writes master and model; else the model is a copy afterwards,
    for apex has one type for both. A scale of 0 changes nothing.

    Shapes: parts of flat [n] tensors; step and scale 0-dim fp32
    """
    lr, weight_decay, beta1, beta2, eps = hyper
    together: dict[torch.dtype, list[Part]] = {}
    alone: list[Part] = []
    copied: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        master, grad, first, second, model = part
        if model is not None and model.dtype == grad.dtype:
            together.setdefault(grad.dtype, []).extend(_slices(part))
            continue
        alone.extend(_slices(Part(master, grad.float(), first, second, None)))
        if model is not None:
            copied.append((model, master))
    device = scale.device
    rate = torch.full((1,), lr, dtype=torch.float32, device=device)  # from a tensor on the host it would wait
    decoupled, bias_correction = 1, 1
    rest = (rate, beta1, beta2, eps, step.to(torch.int32), decoupled, bias_correction, weight_decay, scale)
    skip = (scale == 0).to(torch.int32).view(1)
    amp = importlib.import_module("amp_C")
    if alone:
        lists = [[part[i] for part in alone] for i in (1, 0, 2, 3)]
        amp.multi_tensor_adam_capturable(CHUNK, skip, lists, *rest)
    for group in together.values():
        lists = [[part[i] for part in group] for i in (1, 4, 2, 3, 0)]
        amp.multi_tensor_adam_capturable_master(CHUNK, skip, lists, *rest)
    if copied:
        torch._foreach_copy_([model for model, _ in copied], [master for _, master in copied])


def add_product(total: Tensor, grad_out: Tensor, x: Tensor, beta: int) -> None:
    """total = beta total + grad_out^T x, in place; through apex, which only adds, where total is fp32.

    Shapes: total [o, i], grad_out [n, o], x [n, i]
    """
    if total.dtype != torch.float32:
        return products.add_product(total, grad_out, x, beta)
    # The kernel reads plain addresses, and both operands in x's type.
    assert total.is_contiguous() and grad_out.dtype == x.dtype
    if not beta:
        total.zero_()
    if x.numel():
        module = importlib.import_module("fused_weight_gradient_mlp_cuda")
        module.wgrad_gemm_accum_fp32(x.contiguous(), grad_out.contiguous(), total)


def softmax_or(otherwise: Softmax) -> Softmax:
    """Apex's scaled masked softmax for what it takes, `otherwise` for what `refuses` names."""

    def softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        if refuses(scores, mask, scale, causal) is not None:
            return otherwise(scores, mask, scale, causal)
        hidden = None if mask is None else _hidden(scores, mask, causal)
        out: Tensor = _Softmax.apply(scores, hidden, scale)
        return out

    return softmax


def refuses(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> str | None:
    """Why apex's softmax kernels cannot take these scores; None where they can.

    Shapes: scores [b, a, sq, sk], mask [b or 1, a or 1, sq, sk]
    """
    b, a, sq, sk = scores.shape
    if scores.dtype not in (torch.float16, torch.bfloat16):
        return f"scores are {scores.dtype}, not fp16 or bf16"
    if torch.tensor(scale, dtype=scores.dtype).item() != scale:
        return f"the scale {scale} would be rounded to {scores.dtype}"
    if mask is None and not causal:
        return "there is neither a mask nor a causal one"
    if mask is None and sq != sk:
        return f"causal, {sq} queries and {sk} keys"
    if mask is not None and (mask.shape[0] not in (1, b) or tuple(mask.shape[1:]) != (1, sq, sk)):
        return f"the mask differs between heads, or is {tuple(mask.shape)}"
    longest = 16384 if mask is None else 4096
    if not 0 < sk <= longest or sk % 4 or sq < 2:
        return f"{sq} queries, {sk} keys: more than one and a multiple of 4 up to {longest} are taken"
    rows, of = (b * a, "samples x heads") if mask is None else (sq, "queries")
    together = _rows_together(sk)
    return f"{rows} {of} are no multiple of {together}" if rows % together or not b * a else None


class _Softmax(torch.autograd.Function):
    """softmax(scale x scores), causal where nothing else is hidden."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
        ctx.scale, ctx.masked = scale, hidden is not None
        if hidden is not None:
            kernel = importlib.import_module("scaled_masked_softmax_cuda")
            out: Tensor = kernel.forward(scores.contiguous(), hidden, scale)
        else:
            kernel = importlib.import_module("scaled_upper_triang_masked_softmax_cuda")
            out = kernel.forward(scores.contiguous().flatten(0, 1), scale).view(scores.shape)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        if ctx.masked:
            kernel = importlib.import_module("scaled_masked_softmax_cuda")
            return kernel.backward(grad.contiguous(), out, ctx.scale), None, None
        kernel = importlib.import_module("scaled_upper_triang_masked_softmax_cuda")
        own = grad.clone(memory_format=torch.contiguous_format).flatten(0, 1)  # it is overwritten with the result
        return kernel.backward(own, out.flatten(0, 1), ctx.scale).view(grad.shape), None, None


def _hidden(scores: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """The mask as apex has it: 1 is hidden.

    Shapes: -> [b or 1, 1, sq, sk], bytes
    """
    hidden = ~mask
    if causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
    return hidden.contiguous().view(torch.uint8)


def _rows_together(keys: int) -> int:
    """Rows that one block of 128 threads computes, so that none may be left over."""
    width = 1 << (keys - 1).bit_length()
    return 128 // min(width, 32) * (2 if width <= 128 else 1)


def _slices(part: Part) -> list[Part]:
    """Views of at most LARGEST elements; none of a part without elements, which apex's launcher stumbles over."""
    master, grad, first, second, model = part
    found: list[Part] = []
    for start in range(0, master.numel(), LARGEST):
        cut = slice(start, start + LARGEST)
        low = None if model is None else model[cut]
        found.append(Part(master[cut], grad[cut], first[cut], second[cut], low))
    return found
