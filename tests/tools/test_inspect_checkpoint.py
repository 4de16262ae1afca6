"""What the tool says of one checkpoint and of two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ds.checkpoint.save import save
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Box, Piece
from tools.inspect_checkpoint import main

SOLO = Axis.solo("world")


def two_pieces(name: str, values: torch.Tensor) -> list[Piece]:
    rows, columns = values.shape
    return [
        Piece(name, (rows, columns), Box((0, 0), (1, columns)), values[:1]),
        Piece(name, (rows, columns), Box((1, 0), (rows - 1, columns)), values[1:]),
    ]


def whole(name: str, values: torch.Tensor) -> Piece:
    return Piece(name, tuple(values.shape), Box((0,) * values.dim(), tuple(values.shape)), values)


def test_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = torch.ones(3, 4)
    save(tmp_path, 1, [whole("model/w", w)], {}, SOLO)
    save(tmp_path, 2, [*two_pieces("model/w", w), whole("n", torch.tensor([1]))], {"consumed_samples": 64}, SOLO)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "iteration 2" in out
    assert '"consumed_samples": 64' in out
    rows = [line.split() for line in out.splitlines()]
    assert ["model/w", "[3,", "4]", "F32", "48", "2", "1"] in rows
    assert ["n", "[1]", "I64", "8", "1", "1"] in rows
    assert "2 tensors, 56 bytes, in 1 files" in out
    assert main([str(tmp_path), "--step", "1"]) == 0
    assert "iteration 1" in capsys.readouterr().out
    assert main([str(tmp_path / "iter_0000001")]) == 0


def test_two_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w, nan = torch.ones(3, 4), torch.tensor([float("nan"), 1.0])
    near = w.clone()
    near[2, 1] = 1.5
    same = [whole("same", nan), whole("moved", w)]
    save(tmp_path / "a", 1, [*same, whole("near", w), whole("only_a", nan), whole("cast", w)], {"s": 1}, SOLO)
    save(tmp_path / "b", 1, [whole("same", nan), *two_pieces("moved", w), whole("near", near)], {"s": 1}, SOLO)
    save(tmp_path / "c", 2, [whole("near", w[:2]), whole("cast", w.bfloat16()), whole("same", nan)], {"s": 2}, SOLO)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "same: bit-equal" in lines
    assert "moved: bit-equal" in lines
    assert "near: largest difference 0.5" in lines
    assert any(line.startswith("only_a: only in") for line in lines)
    assert main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "iteration 1 | 2; state differs" in lines
    assert "near: shape [3, 4] | [2, 4]" in lines
    assert "cast: largest difference 0, F32 | BF16" in lines
    assert main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0


def test_a_user_error_is_one_message(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tools" / "inspect_checkpoint.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root)}, check=False)
    assert done.returncode == 4
    assert "no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
