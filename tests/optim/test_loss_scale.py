"""Loss scales against both systems' rules, each written out as they write it."""

from __future__ import annotations

import json
import random

import pytest

from megatron_ds.errors import RunFault
from megatron_ds.optim.config import PrecisionConfig
from megatron_ds.optim.loss_scale import LossScale, LossScaling


class Megatron:
    """A growth and a hysteresis tracker."""

    def __init__(self, initial: float, minimum: float, window: int, hysteresis: int):
        self.scale, self.minimum, self.window, self.hysteresis = initial, minimum, window, hysteresis
        self.growth_tracker, self.hysteresis_tracker = 0, hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = max(self.scale * 0.5, self.minimum)
        else:
            self.growth_tracker += 1
            if self.growth_tracker == self.window:
                self.growth_tracker = 0
                self.hysteresis_tracker = self.hysteresis
                self.scale = self.scale * 2.0


class DeepSpeed:
    """A counter of iterations and the iteration of the last overflow."""

    def __init__(self, initial: float, minimum: float, window: int, hysteresis: int):
        self.scale, self.minimum, self.window, self.hysteresis = initial, minimum, window, hysteresis
        self.iteration, self.last_overflow, self.left = 0, -1, hysteresis

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.left == 1:
                if self.scale == self.minimum:
                    raise ArithmeticError
                self.scale = max(self.scale / 2, self.minimum)
            else:
                self.left -= 1
            self.last_overflow = self.iteration
        elif (self.iteration - self.last_overflow) % self.window == 0:
            self.left = self.hysteresis
            self.scale *= 2
        self.iteration += 1


def rule(deepspeed: bool = False, **flags: float) -> LossScaling:
    return LossScaling.from_config(PrecisionConfig(fp16=True, deepspeed_loss_scaling=deepspeed, **flags))  # type: ignore[arg-type]


def scales(scaling: LossScaling, overflows: str) -> list[float]:
    """The scale after each step, `x` for one with overflow."""
    state, out = scaling.start(), []
    for letter in overflows:
        state = scaling.update(state, letter == "x")
        out.append(state.scale)
    return out


@pytest.mark.parametrize("reference", [Megatron, DeepSpeed])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 3, 7])
def test_both_rules(reference: type[Megatron] | type[DeepSpeed], hysteresis: int, window: int) -> None:
    draw = random.Random(hysteresis * 10 + window)
    for share in (0.05, 0.3, 0.7):
        expected = reference(2.0**20, 1.0, window, hysteresis)
        scaling = rule(
            reference is DeepSpeed, initial_loss_scale=2.0**20, loss_scale_window=window, hysteresis=hysteresis
        )
        state = scaling.start()
        for _ in range(400):
            overflow = draw.random() < share
            try:
                expected.update(overflow)
            except ArithmeticError:
                with pytest.raises(RunFault):
                    scaling.update(state, overflow)
                break
            state = LossScale.from_state(json.loads(json.dumps(scaling.update(state, overflow).state())))
            assert state.scale == expected.scale


def test_by_hand() -> None:
    scaling = rule(initial_loss_scale=16.0, loss_scale_window=2, hysteresis=2)
    # One overflow is borne, the next halves, and so does each one until the scale has doubled once more.
    assert scales(scaling, "xxx.x..xx") == [16, 8, 4, 4, 2, 2, 4, 4, 2]
    assert scales(rule(initial_loss_scale=4.0, hysteresis=1), "xxxx") == [2, 1, 1, 1]
    assert scales(rule(initial_loss_scale=4.0, hysteresis=1, min_loss_scale=3.0), "xx") == [3, 3]


def test_deepspeed_ends_at_the_minimum() -> None:
    scaling = rule(deepspeed=True, initial_loss_scale=4.0, hysteresis=1)
    assert scales(scaling, "xx") == [2, 1]
    with pytest.raises(RunFault) as caught:
        scales(scaling, "xxx")
    assert caught.value.exit_code == 5
    # With a hysteresis the overflow at the minimum is borne first.
    patient = rule(deepspeed=True, initial_loss_scale=1.0, hysteresis=2)
    assert scales(patient, "x") == [1]
    with pytest.raises(RunFault):
        scales(patient, "xx")


def test_constant_and_off() -> None:
    assert scales(rule(loss_scale=128.0), "xx...x") == [128.0] * 6
    for off in (PrecisionConfig(), PrecisionConfig(bf16=True), PrecisionConfig(bf16=True, loss_scale=8.0)):
        assert scales(LossScaling.from_config(off), "xx.") == [1.0] * 3
    assert rule().start().scale == 2.0**32
    assert rule(loss_scale=0.0).dynamic
    assert not rule(loss_scale=1.0).dynamic


def test_resume() -> None:
    dynamic, constant = rule(loss_scale_window=3), rule(loss_scale=64.0)
    state = LossScale(512.0, 2, 1)
    assert dynamic.resume(state) == state
    assert dynamic.update(dynamic.resume(state), overflow=False).scale == 1024
    assert constant.resume(state).scale == 64
    # A run whose scale was fixed, or that had none, says nothing about where a dynamic one should be.
    assert dynamic.resume(constant.start()) == dynamic.start()
    assert dynamic.resume(LossScale()) == dynamic.start()
    # Changed flags hold from now on.
    assert rule(hysteresis=1).resume(LossScale(512.0, 2, 2)).patience == 1
    assert rule(loss_scale_window=2).update(LossScale(512.0, 5, 2), overflow=False).scale == 1024


@pytest.mark.parametrize(
    "damage", [{"scale": 0.0}, {"scale": float("nan")}, {"scale": "1"}, {"good_steps": -1}, {"patience": 1.5}]
)
def test_a_damaged_state(damage: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(damage)).split("_")[0]):
        LossScale.from_state(LossScale(4.0, 1, 1).state() | damage)


def test_a_state_without_a_value() -> None:
    with pytest.raises(KeyError):
        LossScale.from_state({"scale": 1.0, "patience": 0})
