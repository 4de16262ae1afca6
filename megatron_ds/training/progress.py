"""Progress: everything that is resumed, nothing more. Data order, dropout and learning rate are functions of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.optim.loss_scale import LossScale


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    optimizer_steps: updates that were made; fewer than `iteration` when steps were skipped.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_valid_samples: int = 0
    optimizer_steps: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)

    def after_step(self, samples: int, skipped: bool, loss_scale: LossScale) -> Progress:
        """One iteration later."""
        return dataclasses.replace(
            self,
            loss_scale=loss_scale,
            iteration=self.iteration + 1,
            consumed_samples=self.consumed_samples + samples,
            optimizer_steps=self.optimizer_steps + (not skipped),
        )

    def after_validation(self, samples: int) -> Progress:
        """The same iteration, further into the validation set."""
        return dataclasses.replace(self, consumed_valid_samples=self.consumed_valid_samples + samples)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Read back from a checkpoint's state.

        Raises: ValueError, KeyError for what no run can have written
        """
        counts = {f.name: state[f.name] for f in dataclasses.fields(cls) if f.type == "int"}
        for name, value in counts.items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} {value!r}")
        return cls(**counts, loss_scale=LossScale.from_state(state["loss_scale"]))
