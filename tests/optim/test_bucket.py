"""What ZeRO-2 does with a gradient that comes twice before it is reduced."""

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
