"""What the parity of kernels is shown on: some layouts that differ in what they ask of kernels, in fp32 and in bf16."""

from __future__ import annotations

import torch

from megatron_ds.config import parse
from megatron_ds.training.run import chosen_kernels
from tests.helpers.ranks import run_ranks
from tests.parity.compare import STEADY, STEADY_FLAGS, initial, reference, run_and_compare
from tests.parity.harness import arguments, batches, train_without_gradients
from tests.parity.layouts import Layout, world_size
from tests.parity.layouts_models import BertLayout, KinLayout, T5Layout

AnyLayout = Layout | BertLayout | KinLayout | T5Layout
STEPS = 3

SOLO = Layout.parse("1 - 1 1 1f1b 1 0 - tied learned mha padded uneven - overlap")
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


def equals_the_oracle(layout: AnyLayout, flags: str) -> None:
    """Three steps in fp32: losses, norms and every gradient of each."""
    argv = arguments(layout.model, *layout.flags(), *STEADY_FLAGS, *flags.split())
    found = run_and_compare(
        layout.model, argv, world_size(layout), steps=STEPS, mask=layout.mask, optimizer=STEADY, std=0.1
    )
    assert not found, "\n".join(map(str, found))


def stays_near_the_oracle(layout: AnyLayout, flags: str) -> None:
    """Three steps in bf16: losses and norms, as near as the other runs in half precision."""
    argv = arguments(layout.model, *layout.flags(), *STEADY_FLAGS, "--bf16", *flags.split())
    params = {name: value.float() for name, value in initial(layout.model, 0.1).items()}
    data = batches(layout.model, STEPS, layout.mask)
    shares = run_ranks(train_without_gradients, world_size(layout), argv, params, data)
    expected = reference(layout.model, STEPS, layout.mask, STEADY, 0.1).history
    errors = (torch.tensor(shares[0].history).double() / torch.tensor(expected).double() - 1).abs()
    assert errors[:, :-1].max() < 2e-2, "loss"
    assert errors[:, -1].max() < 6e-2, "gradient norm"
