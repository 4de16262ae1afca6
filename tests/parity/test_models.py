"""BERT, T5 and GPT's kin beyond fp32 and beyond one run: half precision near the oracle, checkpoints on any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.parity.compare import STEADY, STEADY_FLAGS, initial, reference
from tests.parity.harness import resume, train_and_save, train_without_gradients
from tests.parity.layouts import world_size
from tests.parity.layouts_models import BertLayout, KinLayout, T5Layout
from tests.parity.models import arguments, batches, oracle_of

AnyLayout = BertLayout | KinLayout | T5Layout
BERT, KIN, T5 = BertLayout.parse, KinLayout.parse, T5Layout.parse


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        (BERT("2 sp 1 2 zbh1 1 1 block post binary padded uneven"), "--bf16"),
        (BERT("1 - a2a2 1 1f1b 1 2 - pre binary exact uneven"), "--fp16 --loss-scale 4096"),
        (T5("1 - 2 - zbh1 1 2 uniform 1.0 2+2 32+16 padded uneven"), "--bf16"),
        (T5("2 sp 1 - 1f1b 1 1 selective megatron 2+2 32+16 exact uneven"), "--fp16 --loss-scale 4096"),
        (T5("1 - 2 - interleaved 1 0 - 1.1 2+2 32+16 padded uneven"), "--bf16 --fp32-residual-connection"),
        (KIN("2 sp 1 1 1f1b 1 0 block qwen3 packed"), "--bf16"),
        (KIN("1 - a2a2 1 1f1b 1 2 - bloom packed"), "--fp16 --loss-scale 4096"),
    ],
    ids=str,
)
def test_half_precision_stays_near_the_oracle(layout: AnyLayout, precision: str) -> None:
    model = layout.model
    argv = arguments(model, *layout.flags(), *STEADY_FLAGS, *precision.split())
    params = {name: value.float() for name, value in initial(model, 0.1).items()}
    share = run_ranks(train_without_gradients, world_size(layout), argv, params, batches(model, 5, layout.mask))[0]
    assert not any(share.skipped)
    expected = reference(model, 5, layout.mask, STEADY, 0.1).history
    errors = (torch.tensor(share.history).double() / torch.tensor(expected).double() - 1).abs()
    assert errors[:, :-1].max() < 2e-2, "loss"
    assert errors[:, -1].max() < 6e-2, "gradient norm"


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (
            BERT("2 sp 1 2 zbh1 1 1 - post binary padded uneven"),
            BERT("1 - a2a2 2 interleaved 1 2 - post binary padded uneven"),
        ),
        (
            T5("2 - 2 1 1f1b 1 1 - 1.0 2+3 32+16 padded uneven"),
            T5("1 - 4 - gpipe 1 0 - 1.0 2+3 32+16 padded uneven"),
        ),
        (
            T5("1 - 2 - interleaved 1 0 - megatron 2+3 32+16 padded uneven"),
            T5("2 sp 1 - zbh1 2 2 - megatron 2+3 32+16 padded uneven"),
        ),
    ],
    ids=["bert", "t5-1.0", "t5-megatron"],
)
def test_a_checkpoint_goes_on_elsewhere(tmp_path: Path, saved: AnyLayout, loaded: AnyLayout) -> None:
    """Losses and norms of six steps, of which the last three were taken on another layout."""
    model = saved.model
    params, data = oracle_of(model).random_params(model, std=0.1), batches(model, 6)
    save = ["--save", str(tmp_path), "--save-interval", "1000"]
    argv = arguments(model, *saved.flags(), *STEADY_FLAGS, *save)
    first = run_ranks(train_and_save, world_size(saved), argv, params, data[:3])[0]
    argv = arguments(model, *loaded.flags(), *STEADY_FLAGS, "--load", str(tmp_path))
    rest = run_ranks(resume, world_size(loaded), argv, data[3:])[0]
    expected = reference(model, 6, "uneven", STEADY, 0.1).history
    torch.testing.assert_close(torch.tensor([*first, *rest]), torch.tensor(expected), rtol=1e-5, atol=0)
