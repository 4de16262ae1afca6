"""What the doctor says on made-up machines, and how it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ds.kernels import installed
from megatron_ds.kernels.choose import OPERATIONS, _triton
from megatron_ds.kernels.installed import Package
from tools.doctor import ADDS, main

NAMES = ("triton", "apex", "flash_attn", "flash_attn_interface", "transformer_engine", "liger_kernel", "torchao")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CPU and torch, nothing else."""
    monkeypatch.setattr(installed, "packages", lambda: tuple(Package(n, None, False, f"no {n}") for n in NAMES))
    monkeypatch.setattr(installed, "triton", lambda: Package("triton", None, False, "no triton"))
    monkeypatch.setattr(installed, "compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def ask(capsys: pytest.CaptureFixture[str], text: str = "") -> tuple[int, dict[str, list[list[str]]], str]:
    """The exit code, and under each heading the words of its rows, continued ones as one."""
    code = main(text.split())
    out, err = capsys.readouterr()
    assert len(out.splitlines()) <= 60 and all(len(line) <= 120 for line in out.splitlines())
    sections: dict[str, list[list[str]]] = {}
    for line in filter(None, out.splitlines()):
        if line[0] != " ":
            rows = sections.setdefault(line.split(":")[0], [])
        elif line[2] != " ":
            rows.append([line[2:22].strip(), line[24:].strip()])
        else:
            rows[-1][1] += " " + line.strip()
    return code, sections, err


def test_a_bare_cpu(bare: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = ask(capsys)
    assert code == 0
    machine = dict(said["Machine"])
    assert torch.__version__ in machine["torch"] and "none" in machine["GPU"]
    kernels = dict(said["Kernels"])
    assert list(kernels) == [*OPERATIONS, "attention"]
    assert all(kernels[operation] == "torch" for operation in OPERATIONS)
    others = dict(said["Other values of --kernels"])
    assert others["reference"] == "can be asked for"
    assert others["compile"] == "torch.compile needs a C++ compiler on CPUs (CXX, g++, clang++)"
    assert others["triton"] == "no triton"
    assert said["Installed"] == [["nothing", ""]]
    missing = dict(said["Missing"])
    assert set(missing) == {*NAMES, "C++ compiler"} == set(ADDS)
    assert missing["liger_kernel"].startswith("no liger_kernel. Adds on a GPU RMSNorm and SwiGLU")
    assert "Adds nothing: its norms are modules that own their weights" in missing["transformer_engine"]
    assert "--kernels compile" in missing["C++ compiler"]


def test_what_is_there_is_not_missing(
    bare: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = (
        Package("apex", "0.1", True, "no amp_C"),
        Package("torchao", "0.18", True, ""),
        Package("triton", "3", True, ""),
    )
    monkeypatch.setattr(installed, "packages", lambda: there)
    monkeypatch.setattr(installed, "compiler", lambda: "/usr/bin/c++")
    _, said, _ = ask(capsys)
    found = dict(said["Installed"])
    assert found["apex"] == "0.1; in part: no amp_C" and found["triton"] == "3"
    assert found["torchao"].startswith("0.18; adds nothing: ")
    assert found["C++ compiler"] == "/usr/bin/c++"
    assert said["Missing"] == [["nothing", ""]]
    assert dict(said["Other values of --kernels"])["compile"] == "can be asked for"


def test_flags_count(bare: None, capsys: pytest.CaptureFixture[str]) -> None:
    _, said, _ = ask(
        capsys, "--bf16 --fp8-format e4m3 --no-rope-fusion --no-bias-swiglu-fusion --attention-backend local"
    )
    kernels = dict(said["Kernels"])
    assert kernels["rope"] == "reference  (--no-rope-fusion)"
    assert kernels["activations"] == "torch  (--no-bias-swiglu-fusion: gated ones from reference)"
    assert kernels["linear"] == "torch in FP8 (e4m3, tensorwise)"
    assert kernels["attention"] == "two products and a softmax"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model-preset bert-base --fp16", "float16, on cpu; heads of 64, attention dropout 0.1"),
        ("--model-preset t5-small", "float32, on cpu; heads of 64, attention dropout"),
        ("--hidden-size 96 --num-attention-heads 2 --attention-dropout 0 --bf16", "bfloat16, on cpu; heads of 48, "),
        ("--kv-channels 40", "heads of 40, "),
        ("--hidden-size 96", "heads of 128, "),
    ],
)
def test_the_model_counts(bare: None, capsys: pytest.CaptureFixture[str], flags: str, expected: str) -> None:
    assert main(flags.split()) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--kernels triton", "found:    triton, and no triton"),
        ("--kernels compile", "found:    compile, and torch.compile needs a C++ compiler"),
        ("--device cuda", "torch sees no GPU"),
        ("--fp16 --bf16", "one of them"),
        ("--fp8-e4m3", "no --bf16 beside it"),
        ("--attention-backend fused --bf16", "half precision on a GPU"),
        ("--kernel triton", "a flag that nobody reads"),
        ("--model-preset gpt5", "names no model"),
    ],
)
def test_refusals(bare: None, capsys: pytest.CaptureFixture[str], flags: str, expected: str) -> None:
    assert main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1 and expected in err


def test_tritons_operations_are_those_it_is_said_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "triton", lambda: Package("triton", "3", True, ""))
    made = set(_triton(torch.device("cuda")).makers)
    assert made == set(OPERATIONS) - {"linear"}
    said = ADDS["triton"].lower()
    words = {"layer_norm": "norms", "rms_norm": "norms", "bias_dropout_add": "bias-dropout-add"}
    assert all(words.get(name, name.replace("_", "-")) in said for name in made)


def test_as_a_program_from_anywhere(tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools/doctor.py"
    command = [sys.executable, str(tool), "--device", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "OMP_NUM_THREADS=1" in done.stdout and "transformer_engine" in done.stdout
