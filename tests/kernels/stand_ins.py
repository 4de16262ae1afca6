"""Modules that say in plain torch what other people's kernels say, and demand of their arguments what those demand.

Written from the sources named at each; what those do in fp32 is done here in fp64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

HALVES = (torch.float16, torch.bfloat16)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, whatever is installed."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def apex_norms() -> dict[str, Callable[..., torch.Tensor]]:
    """NVIDIA/apex, apex/normalization/fused_layer_norm.py, csrc/layer_norm_cuda.cpp."""

    def check(x: torch.Tensor, shape: tuple[int, ...], *affine: torch.Tensor) -> None:
        assert tuple(x.shape[-len(shape) :]) == tuple(shape)
        for t in affine:
            assert tuple(t.shape) == tuple(shape)
            assert t.dtype == x.dtype

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):  # type: ignore[no-untyped-def]
        check(input, normalized_shape, weight, bias)
        wide = input.double()
        centered = wide - wide.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return (scaled * weight.double() + bias.double()).to(input.dtype)

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):  # type: ignore[no-untyped-def]
        check(input, normalized_shape, weight)
        wide = input.double()
        return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).to(input.dtype)

    return {"fused_layer_norm_affine": fused_layer_norm_affine, "fused_rms_norm_affine": fused_rms_norm_affine}


def amp_c(calls: list[str]) -> dict[str, Callable[..., None]]:
    """NVIDIA/apex, csrc/multi_tensor_adam.cu and multi_tensor_apply.cuh: one type for gradients and parameters."""

    def update(depth, chunk, noop, lists, lr, beta1, beta2, eps, step, mode, correct, decay, inv_scale):  # type: ignore[no-untyped-def]
        assert isinstance(chunk, int) and noop.dtype == torch.int32 and noop.shape == (1,)
        assert lr.dtype == torch.float32 and step.dtype == torch.int32 and inv_scale.dtype == torch.float32
        assert mode == 1 and correct == 1
        assert len(lists) == depth and len({len(one) for one in lists}) == 1 and lists[0]
        if noop.item() == 1:
            return
        for tensors in zip(*lists, strict=True):
            g, p, m, v = tensors[:4]
            master = tensors[4] if depth == 5 else p
            assert all(t.is_contiguous() and t.numel() == g.numel() > 0 for t in tensors)
            assert g.dtype == p.dtype == lists[0][0].dtype
            assert m.dtype == v.dtype == torch.float32 and (depth == 4 or master.dtype == torch.float32)
            g.copy_(wide := g.double() * inv_scale.double())
            m.copy_(new_m := beta1 * m.double() + (1 - beta1) * wide)
            v.copy_(new_v := beta2 * v.double() + (1 - beta2) * wide * wide)
            t = int(step.item())
            root = (new_v / (1 - beta2**t)).sqrt() + eps
            new = master.double()
            new = new - lr.double() * (new_m / (1 - beta1**t) / root + decay * new)
            master.copy_(new)
            p.copy_(new)

    def multi_tensor_adam_capturable(*arguments: Any) -> None:
        calls.append("capturable")
        update(4, *arguments)

    def multi_tensor_adam_capturable_master(*arguments: Any) -> None:
        calls.append("capturable_master")
        update(5, *arguments)

    return {
        "multi_tensor_adam_capturable": multi_tensor_adam_capturable,
        "multi_tensor_adam_capturable_master": multi_tensor_adam_capturable_master,
    }


def wgrad_gemm_accum_fp32(input: torch.Tensor, d_output: torch.Tensor, d_weight: torch.Tensor) -> None:
    """NVIDIA/apex, csrc/megatron/fused_weight_gradient_dense_cuda.cu: addresses without strides."""
    assert input.is_contiguous() and d_output.is_contiguous() and d_weight.is_contiguous()
    assert input.dtype == d_output.dtype and d_weight.dtype == torch.float32
    assert input.dim() == d_output.dim() == 2 and d_weight.shape == (d_output.shape[1], input.shape[1])
    d_weight += (d_output.double().t() @ input.double()).float()


def _rows(keys: int) -> int:
    """Rows of a block, csrc/megatron/scaled_masked_softmax.h."""
    width = 1
    while width < keys:
        width *= 2
    return (128 // min(width, 32)) * (2 if width <= 128 else 1)


def _backward(grads: torch.Tensor, results: torch.Tensor, scale: float) -> torch.Tensor:
    p, g = results.double(), grads.double()
    return (scale * p * (g - (p * g).sum(-1, keepdim=True))).to(grads.dtype)


def scaled_masked_softmax() -> dict[str, Callable[..., torch.Tensor]]:
    """NVIDIA/apex, csrc/megatron/scaled_masked_softmax.{cpp,h}, _cuda.cu: a mask of 1 hides."""

    def forward(input: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        b, _, sq, sk = input.shape
        assert input.dtype in HALVES and mask.dtype in (torch.uint8, torch.bool)
        assert sq > 1 and sk <= 4096 and sk % 4 == 0 and sq % _rows(sk) == 0
        assert mask.shape[0] in (1, b) and mask.shape[1:] == (1, sq, sk) and input.is_contiguous()
        rounded = torch.tensor(scale, dtype=input.dtype).double()
        scores = (input.double() * rounded).masked_fill(mask == 1, -10000.0)
        p = scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True) == -10000.0, 0.0)
        return p.to(input.dtype)

    return {"forward": forward, "backward": _backward}


def scaled_upper_triang_masked_softmax() -> dict[str, Callable[..., torch.Tensor]]:
    """NVIDIA/apex, csrc/megatron/scaled_upper_triang_masked_softmax.{cpp,h}, _cuda.cu: backward in place."""

    def forward(input: torch.Tensor, scale: float) -> torch.Tensor:
        n, s, keys = input.shape
        assert input.dtype in HALVES and input.is_contiguous()
        assert s == keys <= 16384 and s % 4 == 0 and n % _rows(s) == 0
        rounded = torch.tensor(scale, dtype=input.dtype).double()
        scores = input.double() * rounded + torch.full((s, s), -torch.inf, dtype=torch.float64).triu(1)
        return scores.softmax(-1).to(input.dtype)

    def backward(grads: torch.Tensor, results: torch.Tensor, scale: float) -> torch.Tensor:
        assert grads.dim() == results.dim() == 3
        return grads.copy_(_backward(grads, results, scale))

    return {"forward": forward, "backward": backward}


def _flash(q, k, v, scale, causal, window):  # type: ignore[no-untyped-def]
    """One sequence: q [sq, a, d], k and v [sk, k, d]; causal and windows end at the last key, as both versions say."""
    (sq, a, d), sk = q.shape, k.shape[0]
    k, v = (t.repeat_interleave(a // t.shape[1], 1).double() for t in (k, v))
    scores = torch.einsum("qad,kad->aqk", q.double(), k) * (d**-0.5 if scale is None else scale)
    distance = torch.arange(sq).unsqueeze(1) + sk - sq - torch.arange(sk)
    left, right = window
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if causal or right >= 0:
        seen &= distance >= -(0 if causal else right)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("aqk,kad->qad", p, v).to(q.dtype)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dims: int) -> None:
    for t in (q, k, v):
        assert t.dim() == dims and t.dtype in HALVES and t.dtype == q.dtype
        assert t.stride(-1) == 1 and t.shape[-1] == q.shape[-1] <= 256
    assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0


def flash(version: int, seen: SimpleNamespace, *, returns_lse: bool = False) -> dict[str, Callable[..., Any]]:
    """Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py (version 3 has no
    dropout, and before commit 203b9b3 returned the log-sum-exp too), csrc/flash_attn/flash_api.cpp."""

    def result(out: torch.Tensor) -> Any:
        return (out, out.new_zeros(1)) if returns_lse else out

    def note(dropout_p: float | None, deterministic: bool) -> None:
        assert (dropout_p is not None) == (version == 2)
        seen.dropout, seen.deterministic = dropout_p, deterministic

    def flash_attn_func(  # type: ignore[no-untyped-def]
        q, k, v, dropout_p=None, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        _check(q, k, v, 4)
        note(dropout_p, deterministic)
        seen.kernel = "dense"
        rows = [_flash(*one, softmax_scale, causal, window_size) for one in zip(q, k, v, strict=True)]
        return result(torch.stack(rows))

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        _check(q, k, v, 3)
        note(dropout_p, deterministic)
        seen.kernel = "varlen"
        for ends, longest, total in ((cu_seqlens_q, max_seqlen_q, len(q)), (cu_seqlens_k, max_seqlen_k, len(k))):
            assert ends.dtype == torch.int32 and ends.is_contiguous() and isinstance(longest, int)
            assert ends[0] == 0 and ends[-1] == total and longest >= int(ends.diff().max()) and ends.diff().min() >= 0
        # Told 1, version 2 reshapes queries to one per sequence.
        assert max_seqlen_q > 1 or len(q) == len(cu_seqlens_q) - 1
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        lengths = (ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k))
        queries, keys = (t.split(sizes) for t, sizes in zip((q, torch.stack((k, v), 1)), lengths, strict=True))
        spans = zip(queries, keys, strict=True)
        parts = [_flash(one, *kv.unbind(1), softmax_scale, causal, window_size) for one, kv in spans]
        return result(torch.cat(parts))

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


class LigerRMSNormFunction(torch.autograd.Function):
    """linkedin/Liger-Kernel, src/liger_kernel/ops/rms_norm.py; "llama" rounds before the weight; backward in place."""

    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):  # type: ignore[no-untyped-def]
        assert X.shape[-1] == W.shape[0] <= 65536
        ctx.save_for_backward(X, W)
        ctx.rest = eps, in_place
        scaled = X.double() / (X.double().square().mean(-1, keepdim=True) + eps).sqrt()
        if casting_mode == "llama":
            return scaled.to(X.dtype) * (W + offset)
        assert casting_mode == "gemma"
        return (scaled * (W.double() + offset)).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):  # type: ignore[no-untyped-def]
        (X, W), (eps, in_place) = ctx.saved_tensors, ctx.rest
        with torch.enable_grad():
            x, w = X.double().detach().requires_grad_(), W.double().detach().requires_grad_()
            y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w
        dx, dw = (g.to(X.dtype) for g in torch.autograd.grad(y, (x, w), dY.double()))
        return dY.copy_(dx) if in_place else dx, dw, None, None, None, None, None


class LigerFusedGateUpSiLUMulFunction(torch.autograd.Function):
    """linkedin/Liger-Kernel 0.8.5, src/liger_kernel/ops/swiglu.py: gate first, up second; the gradient as rows."""

    @staticmethod
    def forward(ctx, y, in_place=False):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y.view(-1, y.shape[-1]))
        assert not in_place
        gate, up = y.double().chunk(2, -1)
        return (gate / (1 + (-gate).exp())).to(y.dtype) * up.to(y.dtype)

    @staticmethod
    def backward(ctx, dc):  # type: ignore[no-untyped-def]
        (y,) = ctx.saved_tensors
        dc = dc.view(len(y), -1)
        gate, up = y.double().chunk(2, -1)
        s = 1 / (1 + (-gate).exp())
        d_gate = dc.double() * up * (s + gate * s * (1 - s))
        return torch.cat((d_gate, dc.double() * gate * s), -1).to(y.dtype), None
