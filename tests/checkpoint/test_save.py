"""Saving: what lands on the disk, and that no fault at any moment costs what was there before."""

from __future__ import annotations

import builtins
import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_ds.checkpoint import shard
from megatron_ds.checkpoint.load import find, holds_checkpoints, load
from megatron_ds.checkpoint.save import save
from megatron_ds.errors import RunFault
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Box, Piece
from tests.checkpoint.fake_world import random_tensor, same_bits, save_all, whole_piece

SOLO = Axis.solo("world")


def test_files_are_readable_by_the_safetensors_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "_BLOCK_BYTES", 40)
    grid = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": grid.t(),
        "columns": grid[:, 1:4],
        "bf16": grid.bfloat16()[1:],
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "flag": torch.tensor([True, False, True]),
        "whole numbers": torch.tensor([[-1], [2**40]]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    size = shard.write_shard(tmp_path / "x.safetensors", list(tensors.items()))
    raw = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for key, entry in json.loads(raw[8:start]).items():
        assert (start + entry["data_offsets"][0]) % tensors[key].element_size() == 0, f"{key} is not aligned"
    assert size == len(raw)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        for key, tensor in tensors.items():
            assert file.get_tensor(key).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(key), tensor), key


def test_index_says_where_the_values_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.arange(12.0).view(4, 3)
    by_rank = [
        [Piece("w", (4, 3), Box((0, 0), (4, 1)), w[:, :1]), Piece("w", (4, 3), Box((0, 1), (1, 2)), w[:1, 1:])],
        [],
        [Piece("w", (4, 3), Box((1, 1), (3, 2)), w[1:, 1:]), whole_piece("b", torch.tensor([5], dtype=torch.int64))],
    ]
    state = {"consumed_samples": 2**40, "rng": [1, 2.5, None, "x"]}
    assert save_all(monkeypatch, tmp_path, 100, by_rank, state) == [None] * 3
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    path = tmp_path / "iter_0000100"
    files = sorted(path.name for path in path.iterdir())
    assert files == ["index.json", "rank_00000.safetensors", "rank_00002.safetensors"]
    index = json.loads((path / "index.json").read_text())
    assert (index["format"], index["version"], index["iteration"]) == ("megatron_ds.checkpoint", 1, 100)
    assert index["state"] == state
    assert index["files"] == {name: {"bytes": (path / name).stat().st_size} for name in files[1:]}
    assert list(index["tensors"]) == ["b", "w"]
    assert index["tensors"]["b"]["dtype"] == "I64"
    assert index["tensors"]["w"]["shape"] == [4, 3]
    rebuilt = torch.zeros(4, 3)
    for box in index["tensors"]["w"]["boxes"]:
        with safe_open(path / box["file"], "pt") as file:
            values = file.get_tensor(box["key"])
        for at in itertools.product(*(range(n) for n in box["shape"])):
            rebuilt[tuple(s + i for s, i in zip(box["start"], at, strict=True))] = values[at]
    assert torch.equal(rebuilt, w)


def test_the_reader_printed_in_the_docs_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoint_format.md").read_text()
    w, scalar = random_tensor((6, 5), torch.bfloat16, 1), torch.tensor(3)
    halves = [Piece("w", (6, 5), Box((0, start), (6, n)), w[:, start : start + n]) for start, n in ((0, 2), (2, 3))]
    assert save_all(monkeypatch, tmp_path, 100, [halves[:1], [*halves[1:], whole_piece("n", scalar)]]) == [None, None]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"json": json, "safe_open": safe_open}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert same_bits(names["tensor"]("w"), w)
    assert names["tensor"]("n") == 3


@pytest.mark.parametrize(
    "rows",
    [[(0, 2), (3, 4)], [(0, 3), (2, 4)], [(0, 4), (0, 4)], [(1, 4)], [(0, 2), (2, 3)]],
    ids=["hole", "overlap", "twice", "no beginning", "no end"],
)
def test_pieces_that_do_not_tile_are_our_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, int]]
) -> None:
    w = torch.arange(8.0).view(4, 2)
    by_rank = [[Piece("w", (4, 2), Box((a, 0), (b - a, 2)), w[a:b])] for a, b in rows]
    raised = save_all(monkeypatch, tmp_path, 1, by_rank)
    assert isinstance(raised[0], AssertionError)
    assert "w" in str(raised[0])
    assert all(isinstance(error, RunFault) for error in raised[1:])
    assert not holds_checkpoints(tmp_path)


def test_ranks_that_disagree_about_a_dtype_are_our_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_rank = [
        [Piece("w", (2,), Box((0,), (1,)), torch.zeros(1))],
        [Piece("w", (2,), Box((1,), (1,)), torch.zeros(1, dtype=torch.bfloat16))],
    ]
    assert isinstance(save_all(monkeypatch, tmp_path, 1, by_rank)[0], AssertionError)


def test_a_name_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="two words"):
        save(tmp_path, 1, [whole_piece("two words", torch.zeros(2))], {}, SOLO)
    assert not holds_checkpoints(tmp_path)


def test_state_that_is_not_json_stops_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_rank: list[list[Piece]] = [[whole_piece("w", torch.zeros(2))], []]
    raised = save_all(monkeypatch, tmp_path, 1, by_rank, {"loss": float("nan")})
    assert isinstance(raised[0], ValueError)
    assert isinstance(raised[1], RunFault)


@pytest.mark.parametrize("sick", [0, 1, 2])
def test_full_disk_on_one_rank_is_the_same_fault_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sick: int
) -> None:
    w = torch.arange(3.0)
    by_rank = [[Piece("w", (3,), Box((i,), (1,)), w[i : i + 1])] for i in range(3)]
    assert save_all(monkeypatch, tmp_path, 1, by_rank) == [None] * 3

    def full(file: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if f"rank_0000{sick}" in str(file) and "x" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(file, mode, *args, **kwargs)

    real_open = open
    monkeypatch.setattr(builtins, "open", full)
    raised = save_all(monkeypatch, tmp_path, 2, by_rank)
    monkeypatch.setattr(builtins, "open", real_open)
    assert {type(error) for error in raised} == {RunFault}
    assert len({str(error) for error in raised}) == 1
    assert f"rank {sick}: OSError: [Errno 28] No space left" in str(raised[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert find(tmp_path).iteration == 1
    assert save_all(monkeypatch, tmp_path, 2, by_rank) == [None] * 3
    assert find(tmp_path).iteration == 2


def test_a_directory_that_is_not_shared_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's file vanishes before rank 0 looks, as it would on another node's disk."""
    real = shard.write_shard

    def elsewhere(path: Path, tensors: Any) -> int:
        size = real(path, tensors)
        if "rank_00001" in path.name:
            path.unlink()
        return size

    monkeypatch.setattr("megatron_ds.checkpoint.save.write_shard", elsewhere)
    w = torch.arange(2.0)
    by_rank = [[Piece("w", (2,), Box((i,), (1,)), w[i : i + 1])] for i in range(2)]
    raised = save_all(monkeypatch, tmp_path, 1, by_rank)
    assert {type(error) for error in raised} == {RunFault}
    assert "rank_00001.safetensors" in str(raised[1])
    assert not holds_checkpoints(tmp_path)


def test_save_in_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFault):
        save(tmp_path / "file" / "dir", 1, [whole_piece("w", torch.zeros(2))], {}, SOLO)


# A fault at every file operation of a save, once each. The directory holds nothing, or iteration 1, or iterations 1
# and 2, when iteration 2 is saved.


class Trap:
    """Counts the file operations of this process and strikes at the `at`-th, or from there on."""

    def __init__(self, at: int, strike: Callable[[], None], lasting: bool = False):
        self.at, self.strike, self.lasting, self.count = at, strike, lasting, 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "open"):
            patch.setattr(os, name, self._around(getattr(os, name)))
        patch.setattr(builtins, "open", self._around(open))
        patch.setattr(shard, "_bytes_of", self._around(shard._bytes_of))  # before every block that is written

    def _around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def trapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at or (self.lasting and self.count > self.at):
                self.strike()
            return real(*args, **kwargs)

        return trapped


def pieces_of(value: float) -> list[Piece]:
    return [whole_piece("model/w", torch.full((5, 4), value)), whole_piece("model/b", torch.full((3,), value))]


def put(directory: Path, iteration: int, value: float) -> None:
    save(directory, iteration, pieces_of(value), {"value": value}, SOLO)


def get(directory: Path) -> tuple[int, float]:
    """The iteration that would be resumed, and the one value in all its tensors and in its state."""
    found, pieces = find(directory), pieces_of(0.0)
    load(found.index, pieces)
    values = {value for piece in pieces for value in piece.tensor.flatten().tolist()} | {found.index.state["value"]}
    assert len(values) == 1, "a mixture of two checkpoints"
    return found.iteration, values.pop()


def prepare(directory: Path, saved: int) -> tuple[int, float] | None:
    for iteration in range(1, saved + 1):
        put(directory, iteration, float(iteration))
    return (saved, float(saved)) if saved else None


def check_after(directory: Path, before: tuple[int, float] | None, at: int) -> None:
    """The old one or the new one, whole; nothing only where nothing was. The next save works and leaves no remains."""
    if before is not None or holds_checkpoints(directory):
        assert get(directory) in (before, (2, 99.0)), f"after a fault at operation {at}"
    put(directory, 3, 3.0)
    assert get(directory) == (3, 3.0)
    assert {path.suffix for path in directory.iterdir() if path.is_dir()} == {""}


STARTS = pytest.mark.parametrize("saved", [0, 1, 2], ids=["first save", "next save", "same iteration again"])


@STARTS
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_error_at_every_file_operation(tmp_path: Path, saved: int, lasting: bool) -> None:
    def strike() -> None:
        raise OSError(errno.EIO, "Input/output error")

    failures = 0
    for at in itertools.count(1):
        directory = tmp_path / str(at)
        before, trap = prepare(directory, saved), Trap(at, strike, lasting)
        with pytest.MonkeyPatch.context() as patch:
            trap.install(patch)
            try:
                put(directory, 2, 99.0)
                failed = False
            except RunFault as fault:
                failed = "Input/output error" in str(fault)
                if not failed:
                    raise
        if not failed:
            assert get(directory) == (2, 99.0)
        elif not lasting:
            assert not list(directory.glob("*.tmp/")), "staging left behind"
        failures += failed
        check_after(directory, before, at)
        if trap.count < at:
            break
    assert failures >= 12


@STARTS
def test_kill_at_every_file_operation(tmp_path: Path, saved: int) -> None:
    kills = 0
    for at in itertools.count(1):
        directory = tmp_path / str(at)
        before, trap = prepare(directory, saved), Trap(at, lambda: os._exit(9))
        child = os.fork()
        if child == 0:
            trap.install(pytest.MonkeyPatch())
            put(directory, 2, 99.0)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        kills += killed
        if not killed:
            assert get(directory) == (2, 99.0)
        check_after(directory, before, at)
        if not killed:
            break
    assert kills >= 12


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    put(tmp_path, 5, 1.0)
    put(tmp_path, 5, 2.0)
    assert get(tmp_path) == (5, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "latest_checkpointed_iteration.txt"]


def test_tensors_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / "iter_best.tmp").mkdir()
    pieces = [whole_piece("w", random_tensor((7, 3), torch.float32, 0).t().requires_grad_())]
    copy = pieces[0].tensor.detach().clone()
    save(tmp_path, 5, pieces, {}, SOLO)
    assert same_bits(pieces[0].tensor.detach(), copy)
    assert (tmp_path / "notes.tmp").read_text() == "mine"
    assert (tmp_path / "iter_best.tmp").is_dir()
