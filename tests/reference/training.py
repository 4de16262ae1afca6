"""The oracles' training loop: AdamW on one process, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GlobalBatch = tuple[Tensor, ...]
"""The tensors of a global batch, samples along the first dim."""


class Objective(NamedTuple):
    """What is minimised: the sum of sums(params, *batch) / counts(*batch), where both have one number per loss."""

    sums: Callable[..., Tensor]
    counts: Callable[..., Tensor]


@dataclass(frozen=True)
class Trained:
    """What a run of `train` leaves behind."""

    history: list[tuple[float, ...]]
    """The losses and then the gradient norm (before clipping) of every step."""
    params: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    """Of every step, before clipping; empty unless asked for."""


def train(
    params: Mapping[str, Tensor],
    objective: Objective,
    global_batches: Sequence[GlobalBatch],
    *,
    lr_at: Callable[[int], float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_grad: float = 1.0,
    micro_batch: int | None = None,
    keep_gradients: bool = False,
) -> Trained:
    """AdamW from zero moments, one step per global batch; step i (from 0) uses lr_at(i). `clip_grad` 0: no clipping.

    `micro_batch` bounds the sequences held at once and changes only rounding. The given `params` are not touched.
    """
    weights = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    decayed = [w for w in weights.values() if w.dim() == 2]
    others = [w for w in weights.values() if w.dim() != 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=False, fused=False)
    trained = Trained([], {}, [])
    for step, batch in enumerate(global_batches):
        optimizer.zero_grad()
        values = _accumulate(weights, objective, batch, micro_batch)
        if keep_gradients:
            trained.gradients.append({name: _gradient(w).clone() for name, w in weights.items()})
        size = torch.nn.utils.clip_grad_norm_(weights.values(), clip_grad or math.inf, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
        trained.history.append((*values.tolist(), size.item()))
    trained.params.update({name: w.detach() for name, w in weights.items()})
    return trained


def _accumulate(
    weights: Mapping[str, Tensor], objective: Objective, batch: GlobalBatch, micro_batch: int | None
) -> Tensor:
    """Add up the gradients micro-batch by micro-batch; the losses of the global batch."""
    counts, size = objective.counts(*batch), micro_batch or len(batch[0])
    values = torch.zeros_like(counts, dtype=torch.float64)
    for part in zip(*(torch.split(tensor, size) for tensor in batch), strict=True):
        losses = objective.sums(weights, *part) / counts
        losses.sum().backward()
        values += losses.detach()
    return values


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
