"""Text from a checkpoint: the likeliest tokens are those of the oracle; wrong requests are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ds.errors import ConfigError, DataError
from megatron_ds.training.inference import generate, load_trained
from tests.helpers.recipe import TINY, Value, run, words
from tests.parity.test_resume import whole_tensors
from tests.reference import gpt as oracle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of weights large enough to prefer some tokens."""
    out = tmp_path_factory.mktemp("saved")
    flags: dict[str, Value] = TINY | {"mock_data": True, "save": str(out), "save_interval": 2, "init_method_std": 0.5}
    assert run(words(flags)).code == 0
    return out


def test_the_likeliest_tokens_are_the_oracles(saved: Path) -> None:
    model = oracle.OracleConfig(num_layers=2, hidden=16, heads=2, kv_heads=2, ffn=64, vocab=101, max_positions=8)
    stored = {name.removeprefix("model/"): t for name, t in whole_tensors(saved).items() if name.startswith("model/")}
    expected = [5, 17, 3]
    for _ in range(5):  # no further than the sequence length
        expected.append(int(oracle.forward(stored, model, torch.tensor([expected]))[0, -1].argmax()))
    found = generate(load_trained(str(saved)), [5, 17, 3], 5, temperature=0, top_k=0, seed=1)
    assert found == expected[: len(found)]
    assert len(found) == 8 or expected[len(found)] == 100, "only the end of the document may stop it"


def test_drawing_repeats_itself_and_stays_among_the_best(saved: Path) -> None:
    trained = load_trained(str(saved))
    draws = [generate(trained, [1], 20, temperature=1.0, top_k=1, seed=seed) for seed in (1, 2)]
    assert draws[0] == draws[1] == generate(trained, [1], 20, temperature=0, top_k=0, seed=3)
    assert len({tuple(generate(trained, [1], 20, temperature=5.0, top_k=0, seed=seed)) for seed in (1, 1, 2)}) == 2


@pytest.mark.parametrize(
    ("prompt", "wrong", "error"),
    [
        ([99, 101], {}, DataError),
        ([1], {"temperature": -1.0}, ConfigError),
        ([1], {"temperature": float("nan")}, ConfigError),
        ([1], {"top_k": -2}, ConfigError),
    ],
)
def test_requests_that_mean_nothing(
    saved: Path, prompt: list[int], wrong: dict[str, float], error: type[Exception]
) -> None:
    request = {"temperature": 1.0, "top_k": 0, "seed": 1} | wrong
    with pytest.raises(error):
        generate(load_trained(str(saved)), prompt, 3, **request)  # type: ignore[arg-type]


def test_the_tool_prints_or_tells(saved: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/generate.py"), "--load", str(saved), "--prompt"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    good = subprocess.run([*command, "5 17"], env=environment, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("5 17")
    bad = subprocess.run([*command, "5 999"], env=environment, capture_output=True, text=True)
    assert bad.returncode == 3
    assert bad.stderr.startswith("error: ")
    assert "Traceback" not in bad.stderr
