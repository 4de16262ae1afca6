"""Any checkpoint resumes on any layout: saved at (2,2,2), resumed elsewhere, a run goes on as if not interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.ranks import run_ranks
from tests.parity.harness import STYLES, arguments, batches, resave, resume, train, train_and_save
from tests.parity.test_gpt import layout_arguments
from tests.reference import gpt as oracle

SAVED_AT = [*layout_arguments(2, 2), "--zero-stage", "1"]
BEFORE, AFTER = 5, 10


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], list[tuple[float, float]]]:
    """A checkpoint after 5 steps on (2,2,2), and the history of the uninterrupted 15 steps there."""
    directory = tmp_path_factory.mktemp(request.param)
    flags = ["--bf16"] * (request.param == "bf16")
    model = STYLES["gpt2"]
    params = oracle.random_params(model, std=0.05)
    data = batches(model, BEFORE + AFTER)
    save = ["--save", str(directory), "--save-interval", "1000"]
    run_ranks(train_and_save, 8, arguments(model, *SAVED_AT, *flags, *save), params, data[:BEFORE])
    whole = run_ranks(train, 8, arguments(model, *SAVED_AT, *flags), params, data)
    return directory, flags, whole[0].history[BEFORE:]


def resumed(
    saved: tuple[Path, list[str], list[tuple[float, float]]], world: int, *layout: str
) -> list[tuple[float, float]]:
    model = STYLES["gpt2"]
    argv = arguments(model, *layout, *saved[1], "--load", str(saved[0]))
    return run_ranks(resume, world, argv, batches(model, BEFORE + AFTER)[BEFORE:])[0]


def test_the_same_layout_goes_on_bit_by_bit(saved: tuple[Path, list[str], list[tuple[float, float]]]) -> None:
    assert resumed(saved, 8, *SAVED_AT) == saved[2]


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "zero"), [(1, 1, 1, 0), (4, 1, 1, 0), (1, 4, 1, 0), (1, 1, 4, 1), (1, 1, 2, 0)]
)
def test_another_layout_goes_on_within_rounding(
    saved: tuple[Path, list[str], list[tuple[float, float]]], tp: int, pp: int, dp: int, zero: int
) -> None:
    got = resumed(saved, tp * pp * dp, *layout_arguments(tp, pp), "--zero-stage", str(zero))
    loss, norm = (2e-2, 6e-2) if saved[1] else (2e-5, 5e-5)
    for (got_loss, got_norm), (true_loss, true_norm) in zip(got, saved[2], strict=True):
        assert got_loss == pytest.approx(true_loss, rel=loss)
        assert got_norm == pytest.approx(true_norm, rel=norm)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (4, "--context-parallel-size 2 --zero-stage 2 --overlap-param-gather"),
        (4, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --tensor-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full"),
        (2, "--pipeline-model-parallel-size 2 --enable-zbh1-pipeline --decoder-first-pipeline-num-layers 1"),
    ],
)
def test_the_other_axes_go_on_within_rounding(
    saved: tuple[Path, list[str], list[tuple[float, float]]], world: int, layout: str
) -> None:
    loss, norm = (2e-2, 6e-2) if saved[1] else (2e-5, 5e-5)
    for (got_loss, got_norm), (true_loss, true_norm) in zip(
        resumed(saved, world, *layout.split()), saved[2], strict=True
    ):
        assert got_loss == pytest.approx(true_loss, rel=loss)
        assert got_norm == pytest.approx(true_norm, rel=norm)


@pytest.mark.parametrize(
    "layout",
    [
        "--context-parallel-size 2 --zero-stage 2 --tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --zero-stage 2",
    ],
)
def test_the_other_axes_go_on_bit_by_bit(tmp_path: Path, layout: str) -> None:
    model = STYLES["gpt2"]
    params, data = oracle.random_params(model, std=0.05), batches(model, 6)
    save = ["--save", str(tmp_path), "--save-interval", "1000"]
    run_ranks(train_and_save, 4, arguments(model, *layout.split(), *save), params, data[:3])
    whole = run_ranks(train, 4, arguments(model, *layout.split()), params, data)[0].history
    rest = run_ranks(resume, 4, arguments(model, *layout.split(), "--load", str(tmp_path)), data[3:])[0]
    assert rest == whole[3:]


def whole_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the latest checkpoint, by docs/checkpoint_format.md and the safetensors library alone."""
    latest = (directory / "latest_checkpointed_iteration.txt").read_text()
    folder = directory / f"iter_{int(latest):07d}"
    index = json.loads((folder / "index.json").read_text())
    files = {name: load_file(folder / name) for name in index["files"]}
    out = {}
    for name, entry in index["tensors"].items():
        out[name] = torch.zeros(entry["shape"], dtype=files[entry["boxes"][0]["file"]][entry["boxes"][0]["key"]].dtype)
        for box in entry["boxes"]:
            where = tuple(slice(a, a + n) for a, n in zip(box["start"], box["shape"], strict=True))
            out[name][where] = files[box["file"]][box["key"]]
    return out


@pytest.mark.parametrize(("tp", "pp", "dp", "zero"), [(1, 1, 1, 0), (4, 1, 1, 0), (1, 4, 1, 0), (1, 1, 4, 1)])
def test_weights_and_moments_are_carried_over_bit_by_bit(
    saved: tuple[Path, list[str], list[tuple[float, float]]], tmp_path: Path, tp: int, pp: int, dp: int, zero: int
) -> None:
    argv = arguments(STYLES["gpt2"], *layout_arguments(tp, pp), "--zero-stage", str(zero), *saved[1])
    argv += ["--load", str(saved[0]), "--save", str(tmp_path), "--save-interval", "1000"]
    run_ranks(resave, tp * pp * dp, argv)
    before, after = whole_tensors(saved[0]), whole_tensors(tmp_path)
    assert before.keys() == after.keys()
    assert any(name.endswith("exp_avg_sq") and tensor.any() for name, tensor in before.items())
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_a_bf16_checkpoint_starts_an_fp32_run_from_its_masters(tmp_path: Path) -> None:
    model = STYLES["gpt2"]
    params = oracle.random_params(model, std=0.05)
    data = batches(model, 1)
    save = ["--save", str(tmp_path), "--save-interval", "1000"]
    # No step is taken, so the masters are the oracle's weights to the last bit.
    run_ranks(train_and_save, 2, arguments(model, *layout_arguments(2, 1), "--bf16", *save), params, [])
    loaded = run_ranks(resume, 1, arguments(model, "--load", str(tmp_path)), data)[0]
    fresh = run_ranks(train, 1, arguments(model), params, data)[0].history
    assert loaded == fresh
    assert all(torch.isfinite(torch.tensor(fresh)).flatten())
