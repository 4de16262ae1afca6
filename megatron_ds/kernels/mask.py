"""Masks of attention, made once per micro-batch for all layers; none is made where a causal flag says it all."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

Mask = Any
"""A tensor [b or 1, a or 1, sq, sk], booleans (what is seen) or numbers (what is added to scores), or what a kernel
that never looks at whole matrices has in its place."""


class Rule(NamedTuple):
    """What a query sees: none of the later keys (causal), at most `window` earlier ones, its own document only.

    Shapes: documents [b, queries] and [b, keys]
    """

    queries: int
    keys: int
    causal: bool
    window: int | None = None
    query_documents: torch.Tensor | None = None
    key_documents: torch.Tensor | None = None
    device: torch.device = torch.device("cpu")

    @classmethod
    def of_padding(cls, query_documents: torch.Tensor, key_documents: torch.Tensor) -> Rule:
        """Both ways, but only within documents (of which padding is one)."""
        lengths = query_documents.shape[1], key_documents.shape[1]
        return cls(*lengths, False, None, query_documents, key_documents, key_documents.device)

    @property
    def is_plain(self) -> bool:
        """True where there is nothing to hide, or nothing but later keys."""
        return self.query_documents is None and (self.window is None or self.window >= self.keys - 1)


def visible(rule: Rule) -> torch.Tensor | None:
    """Which keys a query sees; None where the rule is plain.

    Shapes: -> [b or 1, 1, queries, keys], booleans
    """
    if rule.is_plain:
        return None
    distances = _distances(rule.queries, rule.keys, rule.device)[None, None]
    seen = torch.ones_like(distances, dtype=torch.bool)
    if rule.causal:
        seen = distances >= 0
    if rule.window is not None:
        seen = seen & (distances <= rule.window)
    if rule.query_documents is not None and rule.key_documents is not None:
        seen = seen & (rule.query_documents.unsqueeze(2) == rule.key_documents.unsqueeze(1)).unsqueeze(1)
    return seen


def with_bias(seen: torch.Tensor | None, bias: torch.Tensor, causal: bool) -> torch.Tensor:
    """What is added to scores: `bias`, and -inf where nothing is seen.

    Shapes: seen [b or 1, 1, sq, sk], bias [1, a, sq, sk] -> [b or 1, a, sq, sk]
    """
    if seen is None and causal:
        seen = _distances(bias.shape[-2], bias.shape[-1], bias.device) >= 0
    return bias if seen is None else torch.where(seen, bias, -torch.inf)


def alibi_slopes(heads: int) -> torch.Tensor:
    """2^(-8/a), 2^(-16/a) ...; between two powers of 2 every other slope of the next power follows.

    Shapes: -> [a]
    Source: Press et al. 2022, arXiv:2108.12409
    """
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(slopes)


def alibi_bias(slopes: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """-slope x distance.

    Shapes: slopes [a] -> [1, a, queries, keys]
    """
    return (-slopes.view(-1, 1, 1) * _distances(queries, keys, slopes.device)).unsqueeze(0)


def relative_buckets(
    queries: int, keys: int, *, bidirectional: bool, buckets: int, max_distance: int, device: torch.device
) -> torch.Tensor:
    """Number of the bucket of every distance: half of them one each, the rest growing by powers to `max_distance`.

    Bidirectional, later keys have buckets of their own; otherwise they share that of distance 0.
    Shapes: -> [queries, keys]
    Source: Raffel et al. 2020, arXiv:1910.10683, sec. 2.1, and the code published with it
    """
    distance = _distances(queries, keys, device)
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance < 0) * buckets
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = buckets // 2
    share = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def _distances(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Position of the query minus that of the key.

    Shapes: -> [queries, keys]
    """
    return torch.arange(queries, device=device).unsqueeze(1) - torch.arange(keys, device=device)
