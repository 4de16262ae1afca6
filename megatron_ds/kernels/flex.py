"""Masked attention on GPUs through torch's FlexAttention: what documents and windows hide is left out block by block,
and no matrix of sq x sk is ever made."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_ds.kernels import installed
from megatron_ds.kernels.attention import Attention, Pattern
from megatron_ds.kernels.mask import Mask, Rule, visible

Tensor = torch.Tensor
SMALLEST_HEAD = 16
"""Of torch's kernel on GPUs."""


class FlexMask(NamedTuple):
    """A rule, and which blocks of scores it leaves whole, in part, or not at all."""

    rule: Rule
    blocks: BlockMask


def can_compile(device: torch.device) -> bool:
    """FlexAttention is worth having only as a kernel, which Triton and a C compiler make for a GPU."""
    return device.type == "cuda" and installed.triton().usable


def flex_mask(rule: Rule) -> FlexMask | None:
    """What `flex` takes for a rule; None for one that a causal flag says."""
    if rule.is_plain:
        return None
    documents, keys = rule.query_documents, rule.key_documents

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j if rule.causal else i == i
        if rule.window is not None:
            seen = seen & (i - j <= rule.window)
        if documents is not None and keys is not None:
            seen = seen & (documents[b, i] == keys[b, j])
        return seen

    rows = None if documents is None else len(documents)
    build = _for(rule.device, create_block_mask)
    return FlexMask(rule, build(sees, rows, None, rule.queries, rule.keys, device=rule.device))


def through(otherwise: Attention) -> Attention:
    """As kernels/attention.py's `attention`: FlexAttention for its masks, `otherwise` for the rest.

    For heads too small for the kernel a matrix is made after all.
    """

    def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, pattern: Pattern, dropout: float) -> Tensor:
        if not isinstance(mask, FlexMask):
            return otherwise(q, k, v, mask, pattern, dropout)
        assert not dropout, "FlexAttention has none"
        if q.shape[-1] < SMALLEST_HEAD:
            return otherwise(q, k, v, visible(mask.rule), pattern, dropout)
        call = _for(q.device, flex_attention)
        rows, columns, values = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        shared = k.shape[2] != q.shape[2]
        out = call(rows, columns, values, block_mask=mask.blocks, scale=pattern.scale, enable_gqa=shared)
        together: Tensor = out.permute(2, 0, 1, 3).flatten(2)
        return together

    return flex


def forget() -> None:
    """Drop what was compiled for a trial: beside it torch would compile a run's sizes as sizes that change."""
    torch.compiler.reset()


def _for(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function) if device.type == "cuda" else function


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call."""
    return torch.compile(function)
