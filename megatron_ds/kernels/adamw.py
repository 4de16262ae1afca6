"""AdamW on flat tensors: unscale, update and cast to the model's precision.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

Tensor = torch.Tensor
BLOCK = 256 * 1024
"""Elements that are worked on at once on a CPU."""


class Part(NamedTuple):
    """A flat piece of the optimizer's state, fp32; `grad` may be bf16, and is used up.

    model: the same elements in the model's precision, to be written; None where the model is the master.
    Shapes: all [n]
    """

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    model: Tensor | None


class Hyper(NamedTuple):
    """The numbers of one update. Megatron's and DeepSpeed's names."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float


class AdamW(Protocol):
    """One update of many parts, in place, without waiting for the device."""

    def __call__(self, parts: Sequence[Part], step: Tensor, scale: Tensor, hyper: Hyper) -> None:
        """step counts from 1; scale multiplies the gradients first; both are fp32 scalars on the device.

        With a scale of 0 nothing changes, whatever the gradients are: 0 times one that is not finite is not finite.
        """


def reference(parts: Sequence[Part], step: Tensor, scale: Tensor, hyper: Hyper) -> None:
    """The formula: p = p (1 - lr wd); p = p - lr m' / (sqrt(v') + eps) with m' = m / (1 - beta1^t), v' likewise."""
    lr, weight_decay, beta1, beta2, eps = hyper
    updates = scale != 0
    for master, grad, exp_avg, exp_avg_sq, model in parts:
        g = grad.float() * scale
        m = exp_avg.lerp(g, 1 - beta1)
        v = (exp_avg_sq * beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / (1 - beta2**step)).sqrt_().add_(eps)
        p = (master * (1 - lr * weight_decay)).sub_(m / (1 - beta1**step) / root * lr)
        for old, new in ((exp_avg, m), (exp_avg_sq, v), (master, p)):
            old.copy_(torch.where(updates, new, old))
        if model is not None:
            model.copy_(torch.where(updates, master.to(model.dtype), model))


def fused(parts: Sequence[Part], step: Tensor, scale: Tensor, hyper: Hyper) -> None:
    """Through torch's fused AdamW: on CPUs in blocks that stay in the cache for all that is done to them, elsewhere in
    one launch, but for gradients in bf16, of which fp32 copies are made for one part at a time.
    """
    inverse, skip = scale.reciprocal(), (scale == 0).float()  # torch divides by it
    for group in _groups(parts, scale.device):
        masters, grads = [part.master for part in group], [part.grad.float() for part in group]
        first, second = [part.exp_avg for part in group], [part.exp_avg_sq for part in group]
        torch._fused_adamw_(
            masters, grads, first, second, [], [step] * len(group),
            **hyper._asdict(), amsgrad=False, maximize=False, grad_scale=inverse, found_inf=skip,
        )  # fmt: skip
        # Skipped ones as well: they have that value already.
        copied = [(part.model, part.master) for part in group if part.model is not None]
        if copied:
            torch._foreach_copy_([model for model, _ in copied], [master for _, master in copied])


def _groups(parts: Sequence[Part], device: torch.device) -> Iterator[list[Part]]:
    """What is updated together."""
    if device.type == "cpu":
        yield from ([block] for part in parts for block in _cut(part, BLOCK))
        return
    together = [part for part in parts if part.grad.dtype == torch.float32]
    yield from ([part] for part in parts if part.grad.dtype != torch.float32)
    if together:
        yield together


def _cut(part: Part, size: int) -> list[Part]:
    columns = [[None] * max(1, -(-len(part.master) // size)) if t is None else t.split(size) for t in part]
    return [Part(*row) for row in zip(*columns, strict=True)]
