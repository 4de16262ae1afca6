"""Attention through Dao-AILab's flash-attn, versions 2 and 3: documents as sequences of different lengths, windows, and
fewer key heads than query heads without copies.

Source: flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from megatron_ds.kernels.attention import Pattern
from megatron_ds.kernels.installed import trouble
from megatron_ds.kernels.mask import Mask, Rule

Tensor = torch.Tensor
Attention = Callable[[Tensor, Tensor, Tensor, Mask | None, Pattern, float], Tensor]
MODULES = {2: "flash_attn", 3: "flash_attn_interface"}
LARGEST_HEAD = 256


class Lengths(NamedTuple):
    """Where each document ends among all tokens of the micro-batch, row after row, and how long the longest is.

    Shapes: ends [documents + 1] int32, the first 0
    """

    ends: Tensor
    longest: int


class FlashMask(NamedTuple):
    """A rule, and its documents' lengths where there are documents."""

    rule: Rule
    queries: Lengths | None = None
    keys: Lengths | None = None


@dataclass(frozen=True)
class FlashAttention:
    """The kernels of one version, and what takes over where they cannot say a rule."""

    dense: Callable[..., Any]
    varlen: Callable[..., Any]
    has_dropout: bool
    other_mask: Callable[[Rule], Mask | None]
    other_attention: Attention

    def mask(self, rule: Rule) -> Mask | None:
        """What `attention` takes for a rule; None for one that a causal flag says.

        With documents the host waits once for their numbers: the kernel wants the longest length on the host.
        """
        if rule.is_plain:
            return None
        if rule.query_documents is not None:
            lengths = _lengths(rule)
            return self.other_mask(rule) if lengths is None else FlashMask(rule, *lengths)
        return FlashMask(rule) if rule.queries == rule.keys else self.other_mask(rule)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, pattern: Pattern, dropout: float) -> Tensor:
        """As kernels/attention.py's `attention`.

        Shapes: q [sq, b, a, d], k and v [sk, b, k, d] -> [sq, b, a*d]
        """
        # With fewer queries than keys flash-attn's causal rows end at the last key, ours at the query's own number.
        if not isinstance(mask, FlashMask) and (mask is not None or (pattern.causal and len(q) != len(k))):
            return self.other_attention(q, k, v, mask, pattern, dropout)
        assert self.has_dropout or not dropout, "FlashAttention 3 has none"
        rule = mask.rule if isinstance(mask, FlashMask) else None
        causal = pattern.causal if rule is None else rule.causal
        earlier = -1 if rule is None or rule.window is None else rule.window
        options: dict[str, Any] = {
            "softmax_scale": pattern.scale,
            "causal": causal,
            "window_size": (earlier, 0 if causal else -1),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if self.has_dropout:
            options["dropout_p"] = dropout
        rows, columns, values = (t.transpose(0, 1) for t in (q, k, v))
        if isinstance(mask, FlashMask) and mask.queries is not None and mask.keys is not None:
            packed = (t.flatten(0, 1) for t in (rows, columns, values))
            out = self.varlen(
                *packed, mask.queries.ends, mask.keys.ends, mask.queries.longest, mask.keys.longest, **options
            )
        else:
            out = self.dense(rows, columns, values, **options)
        if isinstance(out, tuple):  # earlier builds of version 3 return the log-sum-exp too
            out = out[0]
        together: Tensor = out.view(rows.shape).transpose(0, 1).contiguous().flatten(2)
        return together


def lacks(version: int) -> str | None:
    """Why a version of flash-attn cannot be used here; None where it can."""
    return trouble(MODULES[version])


def refuses(
    version: int, dtype: torch.dtype, head_size: int, dropout: float, capability: tuple[int, int]
) -> str | None:
    """Why a version of flash-attn does not fit a run on a GPU of this compute capability; None where it does."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn has no {dtype}"
    if head_size > LARGEST_HEAD:
        return f"heads of {head_size} are larger than flash-attn's {LARGEST_HEAD}"
    if version == 2:
        return None if capability >= (8, 0) else "FlashAttention 2 needs Ampere or newer"
    if capability[0] != 9:
        return "FlashAttention 3 is for Hopper"
    if dropout:
        return "FlashAttention 3 has no dropout"
    return f"FlashAttention 3 takes heads of a multiple of 8, not {head_size}" if head_size % 8 else None


def flash_attention(
    version: int, other_mask: Callable[[Rule], Mask | None], other_attention: Attention
) -> FlashAttention:
    """The kernels of an installed version; the others are for rules that it cannot say and for masks of numbers."""
    module = importlib.import_module(MODULES[version])
    dense, varlen = module.flash_attn_func, module.flash_attn_varlen_func
    return FlashAttention(dense, varlen, version == 2, other_mask, other_attention)


def _lengths(rule: Rule) -> tuple[Lengths, Lengths] | None:
    """Of every document in every row its queries and its keys; None where they do not lie one after the other.

    A document may have keys only (padding that no query sees) or queries only.
    """
    assert rule.query_documents is not None and rule.key_documents is not None
    alike = rule.query_documents is rule.key_documents
    sides = (rule.query_documents,) if alike else (rule.query_documents, rule.key_documents)
    numbers = torch.cat(sides, 1).cpu().long()
    parts = numbers.split([side.shape[1] for side in sides], 1)
    if any(bool((part.diff(dim=1) < 0).any()) for part in parts):
        return None
    first = int(numbers.min())
    kinds = int(numbers.max()) - first + 1
    row = torch.arange(len(numbers)).unsqueeze(1) * kinds - first
    counts = [(part + row).flatten().bincount(minlength=len(numbers) * kinds) for part in parts]
    queries, keys = counts[0], counts[-1]
    if (rule.causal or rule.window is not None) and not torch.equal(queries, keys):
        return None
    present = (queries + keys) > 0
    return _ends(queries[present], rule.device), _ends(keys[present], rule.device)


def _ends(lengths: Tensor, device: torch.device) -> Lengths:
    ends = F.pad(lengths.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    # Where it is told 1, version 2 takes for granted that every document has one query; a larger bound costs nothing.
    return Lengths(ends, max(int(lengths.max()), 2))
