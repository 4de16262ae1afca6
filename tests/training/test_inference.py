"""What a model without its training computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.kernels.choose import Chosen
from megatron_ds.kernels.table import Kernels
from megatron_ds.training import inference
from tests.reference import gpt
from tests.tools.written import GPT, write_checkpoint


@pytest.mark.parametrize("fp32", [False, True])
def test_kernels_are_chosen_for_its_device_and_precision(
    fp32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    kernels = Kernels()

    def choose(config: Any, device: torch.device, dtype: torch.dtype, **sizes: int) -> Chosen:
        asked.append((config.kernels, device.type, dtype, sizes))
        return Chosen(kernels, ())

    monkeypatch.setattr(inference, "choose", choose)
    params = {name: values.bfloat16() for name, values in gpt.random_params(GPT).items()}
    trained = inference.load_trained(str(write_checkpoint(tmp_path, "GPT", params)), fp32=fp32)
    assert trained.runtime.kernels is kernels
    assert asked == [("auto", "cpu", trained.dtype, {"head_size": 4, "hidden_size": 16})]
    assert trained.dtype == (torch.float32 if fp32 else torch.bfloat16)
