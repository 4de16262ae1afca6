"""The package's tables of kernels, one for each value of --kernels that a device can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.kernels.choose import OFFERS, REFERENCE, choose
from megatron_ds.kernels.config import Backend, KernelConfig
from megatron_ds.kernels.table import Kernels


class Table(NamedTuple):
    """A table, and the softmax that its attention would use if it were unfused."""

    kernels: Kernels
    softmax: Callable[[Tensor, Tensor | None, float, bool], Tensor]


def tables(device: torch.device, dtype: torch.dtype) -> dict[str, Table]:
    """By the value of --kernels."""
    found = {}
    for name in get_args(Backend):
        try:
            kernels = choose(KernelConfig(kernels=name), device, dtype).kernels
        except ConfigError:
            continue
        source: Any = OFFERS[
            "triton" if name == "auto" and device.type == "cuda" else name if name in OFFERS else "torch"
        ]
        make = source(device).makers.get("softmax", lambda: REFERENCE["softmax"])
        found[name] = Table(kernels, make())
    return found
