"""What becomes of the last step's gradients, and, in ZeRO-2, of one that comes twice before it is reduced."""

from __future__ import annotations

import torch

from megatron_ds.optim.bucket import Bucket
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Init, ParamSpec


def test_gradients_that_meet_before_their_reduction_are_added_in_fp32() -> None:
    spec = ParamSpec("x", (4,), Init("zeros"))
    params, grads = torch.zeros(4).bfloat16(), torch.zeros(2)
    bucket = Bucket([spec], 0, {"x": 0}, params, grads, 0, 2, Axis("dp_cp", 2, 0), None)
    for value in (1.0, 2.0**-10, 2.0**-10):  # each of the small ones is lost beside 1 in bf16
        bucket.take("x", torch.full((4,), value).bfloat16())
    assert bucket.arrived["x"].tolist() == [1 + 2.0**-9] * 4


def test_what_is_not_overwritten_is_zero() -> None:
    specs = [ParamSpec(name, (2,), Init("zeros")) for name in "xyz"]
    grads = torch.arange(1.0, 8.0)  # the last one is padding
    offsets = {"x": 0, "y": 2, "z": 4}
    bucket = Bucket(specs, 0, offsets, torch.zeros(7), grads, 0, 7, Axis("dp_cp", 1, 0), None)
    bucket.clear({"y", "of another bucket"})
    assert grads.tolist() == [0, 0, 3, 4, 0, 0, 0]
    assert bucket.is_first("y") and not bucket.is_first("y") and not bucket.is_first("x")
    bucket.reduce()
    assert grads.tolist() == [0, 0, 3, 4, 0, 0, 0]
    bucket.settle()
    bucket.clear({"y"})
    bucket.reduce()
    assert grads.tolist() == [0] * 7 and not bucket.is_first("y")
