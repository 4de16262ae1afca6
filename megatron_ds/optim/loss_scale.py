"""The factor on the loss that keeps fp16 gradients from vanishing: both systems' rules, as arithmetic on a state.

    step without overflow   after `window` of them in a row the scale doubles and all `hysteresis` overflows are back
    step with overflow      the first hysteresis - 1 are borne; each one after them halves the scale

Megatron counts down from `hysteresis` to 0, DeepSpeed to 1, with the same outcome. They differ at the minimum:
Megatron goes on there, DeepSpeed ends the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ds.errors import RunFault
from megatron_ds.optim.config import PrecisionConfig


@dataclass(frozen=True)
class LossScale:
    """The scale of the next step, and what the rule has to remember.

    good_steps: steps since the last overflow or doubling. patience: overflows up to the next halving; 0: never any.
    """

    scale: float = 1.0
    good_steps: int = 0
    patience: int = 0

    def state(self) -> dict[str, float | int]:
        """Plain values for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LossScale:
        """Read back from a checkpoint's state.

        Raises: ValueError, KeyError for what no run can have written
        """
        scale, good_steps, patience = state["scale"], state["good_steps"], state["patience"]
        if type(scale) not in (float, int) or not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"loss scale {scale!r}")
        for name, value in (("good_steps", good_steps), ("patience", patience)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} {value!r}")
        return cls(float(scale), good_steps, patience)


@dataclass(frozen=True)
class LossScaling:
    """The rule that a run follows.

    ends_at_minimum: an overflow at `minimum` ends the run (DeepSpeed) instead of being skipped (Megatron).
    """

    dynamic: bool
    initial: float
    minimum: float
    window: int
    hysteresis: int
    ends_at_minimum: bool

    @classmethod
    def from_config(cls, precision: PrecisionConfig) -> LossScaling:
        """Without --fp16 the scale is 1; a --loss-scale of 0 means a dynamic one, as it does in both systems."""
        constant = precision.loss_scale if precision.fp16 else 1.0
        return cls(
            dynamic=not constant,
            initial=constant or precision.initial_loss_scale,
            minimum=precision.min_loss_scale,
            window=precision.loss_scale_window,
            hysteresis=precision.hysteresis,
            ends_at_minimum=precision.deepspeed_loss_scaling,
        )

    def start(self) -> LossScale:
        """The state of a fresh run."""
        return LossScale(self.initial, 0, self.hysteresis if self.dynamic else 0)

    def resume(self, saved: LossScale) -> LossScale:
        """The saved state if it was one of a dynamic scale and this is one too; otherwise a fresh start."""
        if not self.dynamic or not saved.patience:
            return self.start()
        return dataclasses.replace(saved, patience=min(saved.patience, self.hysteresis))

    def update(self, now: LossScale, overflow: bool) -> LossScale:
        """The state after a step; a step with overflow has to be skipped.

        Raises: RunFault if DeepSpeed's rule has nowhere to go
        Source: Micikevicius et al. 2018, arXiv:1710.03740, sec. 3.2
        """
        if not self.dynamic:
            return now
        if overflow:
            return self._after_overflow(now)
        if now.good_steps + 1 >= self.window:
            return LossScale(now.scale * 2, 0, self.hysteresis)
        return dataclasses.replace(now, good_steps=now.good_steps + 1)

    def _after_overflow(self, now: LossScale) -> LossScale:
        if now.patience > 1:
            return LossScale(now.scale, 0, now.patience - 1)
        if self.ends_at_minimum and now.scale == self.minimum:
            raise RunFault(
                "loss scale",
                f"an overflow at the minimum of {self.minimum:g}",
                "finite gradients at some scale",
                "a smaller --lr, --bf16 instead of --fp16, or a smaller fp16.min_loss_scale",
            )
        return LossScale(max(now.scale / 2, self.minimum), 0, 1)
