"""Masks of attention, made once per micro-batch for all layers; none is made where a causal flag says it all."""

from __future__ import annotations

import math

import torch


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
    query_documents: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Which keys a query sees: none later (causal), at most `window` earlier ones, only those of its own document.

    None where there is nothing to hide, or nothing but later keys.
    Shapes: documents [b, queries] and [b, keys] -> [b or 1, 1, queries, keys], booleans
    """
    seen: torch.Tensor | None = None
    if query_documents is not None and key_documents is not None:
        seen = (query_documents.unsqueeze(2) == key_documents.unsqueeze(1)).unsqueeze(1)
    if window is not None and window < keys - 1:
        near = (_distances(queries, keys, device) <= window)[None, None]
        seen = near if seen is None else seen & near
    if seen is None or not causal:
        return seen
    return seen & (_distances(queries, keys, device) >= 0)


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
