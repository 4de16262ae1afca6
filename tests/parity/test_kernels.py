"""Whatever kernels are asked for, the same model is trained: in every gradient of some steps the oracle's.

What --kernels auto chooses, the other files of this folder train with.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.kernels import installed
from megatron_ds.kernels.choose import OPERATIONS
from megatron_ds.kernels.config import KernelConfig
from tests.house.source import ROOT
from tests.parity.harness import train, train_without_gradients
from tests.parity.kernels_common import (
    BERT,
    LAYOUTS,
    SEQUENCE_PARALLEL,
    SOLO,
    SOLO_LLAMA,
    TIED_ENDS,
    ZERO_2,
    AnyLayout,
    equals_the_oracle,
    on_a_cpu,
    sources,
    stays_near_the_oracle,
)

FUSIONS = [field.name for field in dataclasses.fields(KernelConfig) if field.default is True]
NO_FUSION = " ".join(f"--no-{name.replace('_', '-')}" for name in FUSIONS)
VALUES = {
    "--kernels reference": {*OPERATIONS, "attention"},
    "--attention-backend unfused": {"attention"},
    "--attention-backend flash": {"attention"},
    NO_FUSION: {"layer_norm", "rms_norm", "rope", "bias_dropout_add", "softmax", "linear"},
    "--no-gradient-accumulation-fusion": {"linear"},
}
"""Flags, and the operations that come from elsewhere with them than without."""

each_value = pytest.mark.parametrize("flags", VALUES, ids=lambda flags: "no-fusion" if flags == NO_FUSION else flags)


@each_value
def test_the_flags_decide(flags: str) -> None:
    usual, found = sources(""), sources(flags)
    assert {operation for operation in usual if found[operation] != usual[operation]} == VALUES[flags]


def test_every_fusion_is_switched_off() -> None:
    assert set(FUSIONS) >= {
        "masked_softmax_fusion",
        "bias_swiglu_fusion",
        "bias_dropout_fusion",
        "rope_fusion",
        "gradient_accumulation_fusion",
    }


@each_value
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_three_steps_equal_the_oracle(layout: AnyLayout, flags: str) -> None:
    equals_the_oracle(layout, flags)


@each_value
@pytest.mark.parametrize("layout", [SEQUENCE_PARALLEL, TIED_ENDS], ids=str)
def test_bf16_stays_near_the_oracle(layout: AnyLayout, flags: str) -> None:
    stays_near_the_oracle(layout, flags)


@pytest.mark.parametrize("layout", [SEQUENCE_PARALLEL, ZERO_2, BERT], ids=str)
def test_products_of_a_slow_cpu_equal_the_oracle(layout: AnyLayout) -> None:
    """In fp32, where they round as any others do."""
    equals_the_oracle(layout, "", work=partial(on_a_cpu, True, train))


@pytest.mark.parametrize("slow", [True, False], ids=["slow", "fast"])
@pytest.mark.parametrize("layout", [SEQUENCE_PARALLEL, TIED_ENDS], ids=str)
def test_bf16_stays_near_the_oracle_on_any_cpu(layout: AnyLayout, slow: bool) -> None:
    stays_near_the_oracle(layout, "", work=partial(on_a_cpu, slow, train_without_gradients))


@pytest.mark.slow
@pytest.mark.skipif(installed.compiler() is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing compiled before, so that no older kernel is what is tested."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    flags = "--kernels compile --attention-backend unfused"
    found = sources(flags)
    assert {name for name, source in found.items() if source != "compile"} == {"cross_entropy", "adamw", "attention"}
    equals_the_oracle(SOLO_LLAMA, flags, steps=2, layers=1)
    stays_near_the_oracle(SOLO, flags, steps=2, layers=1)
    assert any(tmp_path.rglob("*.so"))


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
