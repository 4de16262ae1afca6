"""What the parity of kernels is shown on: some layouts that differ in what they ask of kernels, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ds.config import parse
from megatron_ds.kernels import installed
from megatron_ds.training.run import chosen_kernels
from tests.helpers.ranks import run_ranks
from tests.parity.compare import STEADY, STEADY_FLAGS, initial, mismatches, reference
from tests.parity.harness import Share, arguments, batches, train, train_without_gradients
from tests.parity.layouts import Layout, world_size
from tests.parity.layouts_models import BertLayout, KinLayout, T5Layout
from tests.reference.training import Trained

AnyLayout = Layout | BertLayout | KinLayout | T5Layout
SLOW_S = 600.0
"""Compiled or interpreted on a busy machine, steps take their time."""

SOLO = Layout.parse("1 - 1 1 1f1b 1 0 - tied learned mha padded uneven - overlap")
SOLO_LLAMA = Layout.parse("1 - 1 1 1f1b 1 0 - untied rope gqa padded uneven - overlap")
TENSOR_PARALLEL = Layout.parse("2 - 1 1 1f1b 1 0 - tied learned mha padded uneven - overlap")
SEQUENCE_PARALLEL = Layout.parse("2 sp 1 1 1f1b 1 0 - tied rope gqa padded uneven - overlap")
TIED_ENDS = Layout.parse("1 - 1 2 1f1b 1 1 selective tied learned mha padded uneven - overlap")
ZERO_2 = Layout.parse("1 - 1 1 1f1b 2 2 - tied rope gqa padded holes - overlap")
ZERO_BUBBLE = Layout.parse("1 - 1 2 zbh1 1 0 - tied learned gqa exact full - overlap")
BERT = BertLayout.parse("2 sp 1 1 1f1b 1 1 - post binary padded uneven")
T5 = T5Layout.parse("1 - 2 - 1f1b 1 0 - 1.0 2+2 32+16 padded uneven")
PACKED = KinLayout.parse("1 - 1 1 1f1b 1 0 - bloom packed")
LAYOUTS: list[AnyLayout] = [SOLO, SEQUENCE_PARALLEL, TIED_ENDS, ZERO_2, ZERO_BUBBLE, BERT, T5, PACKED]


def sources(flags: str) -> dict[str, str]:
    """Where each operation of a run with these flags comes from."""
    config = parse(arguments(SOLO.model, *flags.split()), {"model_type": "GPT"})
    return {choice.operation: choice.source for choice in chosen_kernels(config, torch.device("cpu")).choices}


def on_a_cpu(slow: bool, work: Callable[..., Share], *arguments: Any) -> Share:
    """Run on every rank: as on a CPU that multiplies the model's precision more slowly than fp32, or as on another."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(installed, "slow_half", lambda dtype: "slow" if slow else None)
        return work(*arguments)


def equals_the_oracle(
    layout: AnyLayout,
    flags: str,
    *,
    steps: int = 3,
    layers: int | None = None,
    work: Callable[..., Share] = train,
) -> None:
    """In fp32: losses, norms and every gradient of each step; `layers`: of the model, if not those of the layout."""
    shares, expected = _both(work, layout, flags, steps, layers)
    found = mismatches(shares, expected, loss=1e-5, norm=1e-5, gradient=1e-5)
    assert not found, "\n".join(map(str, found))


def stays_near_the_oracle(
    layout: AnyLayout,
    flags: str,
    *,
    steps: int = 3,
    layers: int | None = None,
    work: Callable[..., Share] = train_without_gradients,
) -> None:
    """In bf16: losses and norms of each step, as near as those of the other runs in half precision."""
    shares, expected = _both(work, layout, f"{flags} --bf16", steps, layers)
    errors = (torch.tensor(shares[0].history).double() / torch.tensor(expected.history).double() - 1).abs()
    assert errors[:, :-1].max() < 2e-2, "loss"
    assert errors[:, -1].max() < 6e-2, "gradient norm"


def _both(
    work: Callable[..., Share], layout: AnyLayout, flags: str, steps: int, layers: int | None
) -> tuple[list[Share], Trained]:
    """What the ranks saw, and the oracle."""
    model: Any = layout.model if layers is None else replace(layout.model, num_layers=layers)
    argv = arguments(model, *layout.flags(), *STEADY_FLAGS, *flags.split())
    params = {name: value.float() for name, value in initial(model, 0.1).items()}
    data = batches(model, steps, layout.mask)
    shares = run_ranks(work, world_size(layout), argv, params, data, timeout_s=SLOW_S)
    return shares, reference(model, steps, layout.mask, STEADY, 0.1)
