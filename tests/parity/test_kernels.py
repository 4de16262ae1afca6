"""Whatever kernels are asked for, the same model is trained: in every gradient of three steps the oracle's.

What --kernels auto chooses, the other files of this folder train with.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.kernels import installed
from megatron_ds.kernels.choose import OPERATIONS
from megatron_ds.kernels.config import KernelConfig
from tests.house.source import ROOT
from tests.parity.kernels_common import (
    LAYOUTS,
    SEQUENCE_PARALLEL,
    SOLO,
    TIED_ENDS,
    AnyLayout,
    equals_the_oracle,
    sources,
    stays_near_the_oracle,
)

NO_FUSION = " ".join(
    f"--no-{field.name.replace('_', '-')}" for field in dataclasses.fields(KernelConfig) if field.default is True
)
EVERY = dict.fromkeys(OPERATIONS, "reference")
PLAIN_SUM = {"linear": "reference"}
VALUES: dict[str, dict[str, str]] = {
    "--kernels reference": EVERY | {"attention": "torch SDPA"},
    "--attention-backend unfused": {"attention": "unfused"},
    "--attention-backend flash": {"attention": "torch SDPA"},
    NO_FUSION: PLAIN_SUM | dict.fromkeys(("layer_norm", "rope", "bias_dropout_add", "softmax"), "reference"),
    "--no-gradient-accumulation-fusion": PLAIN_SUM,
}
"""Flags, and what they make differ from the choice for a CPU."""

AUTO = dict.fromkeys(OPERATIONS, "torch") | {"attention": "torch, by blocks of rows"}
COMPILED = dict.fromkeys(OPERATIONS, "compile") | dict.fromkeys(("linear", "adamw"), "torch")

each_value = pytest.mark.parametrize("flags", VALUES, ids=lambda flags: "no-fusion" if flags == NO_FUSION else flags)


@each_value
def test_the_flags_decide(flags: str) -> None:
    assert sources(flags) == AUTO | VALUES[flags] != AUTO


def test_every_fusion_is_switched_off() -> None:
    assert NO_FUSION.split() == [
        "--no-masked-softmax-fusion",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
        "--no-rope-fusion",
        "--no-persist-layer-norm",
        "--no-gradient-accumulation-fusion",
    ]


@each_value
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_three_steps_equal_the_oracle(layout: AnyLayout, flags: str) -> None:
    equals_the_oracle(layout, flags)


@each_value
@pytest.mark.parametrize("layout", [SEQUENCE_PARALLEL, TIED_ENDS], ids=str)
def test_bf16_stays_near_the_oracle(layout: AnyLayout, flags: str) -> None:
    stays_near_the_oracle(layout, flags)


@pytest.mark.slow
@pytest.mark.skipif(installed.compiler() is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing compiled before; what one run has compiled serves the next."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    flags = "--kernels compile --attention-backend unfused"
    assert sources(flags) == COMPILED | {"attention": "unfused"}
    equals_the_oracle(SOLO, flags)
    equals_the_oracle(SEQUENCE_PARALLEL, flags)
    assert any(tmp_path.iterdir())


@pytest.mark.slow
def test_triton_interpreted() -> None:
    """Triton reads when it is imported whether to interpret, so these ranks come from a process of their own."""
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("this Triton cannot interpret loops with this numpy")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests/parity/triton_cases.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    assert "7 passed" in done.stdout and "skipped" not in done.stdout, done.stdout
