from __future__ import annotations

import argparse
import enum
import functools
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ds.convert.unpickle import Inert, load_pickled
from megatron_ds.errors import CheckpointError


class _Runs:
    """Pickles into a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def _foreign(monkeypatch: pytest.MonkeyPatch, module: str, **classes: Any) -> None:
    """Make classes importable as if the package were installed, for as long as a file is written."""
    for i, _ in enumerate(parts := module.split(".")):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
    for name, cls in classes.items():
        cls.__module__, cls.__qualname__ = module, name
        setattr(sys.modules[module], name, cls)


@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_options_and_plain_values_come_back(tmp_path: Path, new_format: bool) -> None:
    state = {
        "args": argparse.Namespace(hidden_size=8, params_dtype=torch.bfloat16, split="1,2", lr=1e-3),
        "model": OrderedDict(weight=torch.arange(6.0).view(2, 3), half=torch.ones(2, dtype=torch.bfloat16)),
        "shapes": torch.Size([2, 3]),
        "rng": np.random.RandomState(1).get_state(),
        "scalar": np.float64(2.0),
    }
    torch.save(state, tmp_path / "f.pt", _use_new_zipfile_serialization=new_format)
    loaded = load_pickled(tmp_path / "f.pt")
    assert vars(loaded["args"]) == vars(state["args"])  # type: ignore[call-overload]
    assert torch.equal(loaded["model"]["weight"], torch.tensor([[0.0, 1, 2], [3, 4, 5]]))
    assert loaded["model"]["half"].dtype == torch.bfloat16
    assert loaded["shapes"] == (2, 3)
    assert isinstance(loaded["scalar"], Inert)


@pytest.mark.parametrize("new_format", [True, False])
def test_classes_of_megatron_and_deepspeed_need_not_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    class Kind(enum.Enum):
        rotary = 1
        alibi = 3

    class Scaler:
        def __init__(self) -> None:
            self.scale = 2.0

    with monkeypatch.context() as patch:
        _foreign(patch, "megatron.model.enums", Kind=Kind)
        _foreign(patch, "deepspeed.runtime.fp16.loss_scaler", Scaler=Scaler)
        by_name = _Runs(getattr, Kind, "alibi")
        state = {"kind": Kind.alibi, "by_name": by_name, "scaler": Scaler(), "io": io.BytesIO(b"x")}
        torch.save(state, tmp_path / "f.pt", _use_new_zipfile_serialization=new_format)
    assert "megatron" not in sys.modules and "deepspeed" not in sys.modules
    loaded = load_pickled(tmp_path / "f.pt")
    assert all(isinstance(value, Inert) for value in loaded.values())
    assert loaded["kind"].arguments == (3,)
    assert loaded["by_name"].arguments[-1] == "alibi"


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {canary}",), "posix.system"),
        (eval, ("open('{canary}', 'w')",), "eval"),
        (functools.partial, (print,), "functools.partial"),
        (open, ("{canary}", "w"), "io.open"),
        (pickle.loads, (b"x",), "pickle.loads"),
    ],
)
def test_anything_that_could_act_is_refused_by_name(
    tmp_path: Path, new_format: bool, function: Any, arguments: tuple[Any, ...], named: str
) -> None:
    canary = tmp_path / "canary"
    filled = tuple(a.format(canary=canary) if isinstance(a, str) else a for a in arguments)
    state = {"model": torch.ones(1), "args": _Runs(function, *filled)}
    torch.save(state, tmp_path / "f.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=f"a pickled \\S*{named.split('.')[-1]}, which could run") as caught:
        load_pickled(tmp_path / "f.pt")
    assert caught.value.subject == str(tmp_path / "f.pt")
    assert not canary.exists()


def test_getattr_is_a_stand_in_too(tmp_path: Path) -> None:
    """Otherwise it would lead from a harmless object to its globals and from there to everything."""
    torch.save({"x": _Runs(getattr, torch.Size, "__class__")}, tmp_path / "f.pt")
    loaded = load_pickled(tmp_path / "f.pt")
    assert isinstance(loaded["x"], Inert)


def test_foreign_names_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def system(command: str) -> None:
        raise AssertionError("was run")

    with monkeypatch.context() as patch:
        _foreign(patch, "megatron.os", system=system)
        torch.save({"x": _Runs(system, "touch canary")}, tmp_path / "f.pt")
    assert load_pickled(tmp_path / "f.pt")["x"].arguments == ("touch canary",)


def test_the_list_is_closed_again(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "f.pt")
    before = set(torch.serialization.get_safe_globals())
    load_pickled(tmp_path / "f.pt")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_files_are_one_clear_error(tmp_path: Path, new_format: bool) -> None:
    file = tmp_path / "f.pt"
    torch.save({"w": torch.ones(1000)}, file, _use_new_zipfile_serialization=new_format)
    whole = file.read_bytes()
    for content in (b"", whole[:50], whole[: len(whole) // 2], whole[:-1000], whole[9:], b"text\n" * 99):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="a damaged file"):
            load_pickled(file)
    torch.save([1], file)
    with pytest.raises(CheckpointError, match="a list"):
        load_pickled(file)
    with pytest.raises(CheckpointError, match="No such file"):
        load_pickled(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="directory"):
        load_pickled(tmp_path)
