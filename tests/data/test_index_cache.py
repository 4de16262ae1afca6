"""The cache: built once, rebuilt when damaged, and never in the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data.index_cache import Arrays, IndexCache

KEY = {"data": "abc", "seed": 1}


class Build:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"a": np.arange(10, dtype=np.int32), "b": np.ones((2, 3))}


def one_file(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"x-*/{name}")
    return found


def test_second_time_reads(tmp_path: Path) -> None:
    build = Build()
    for _ in range(2):
        got = IndexCache(tmp_path / "cache").get("x", KEY, build)
        assert got["a"].tolist() == list(range(10)) and got["a"].dtype == np.int32 and got["b"].shape == (2, 3)
    assert build.calls == 1
    IndexCache(tmp_path / "cache").get("x", KEY | {"seed": 2}, build)
    assert build.calls == 2 and not list((tmp_path / "cache").glob("*.lock"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "description", "pickle"])
def test_damage_is_rebuilt(tmp_path: Path, damage: str) -> None:
    build, cache = Build(), IndexCache(tmp_path)
    cache.get("x", KEY, build)
    path = one_file(tmp_path, "a.npy")
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-3])
    elif damage == "flip":
        path.write_bytes(content[:-3] + b"\x63" + content[-2:])
    elif damage == "remove":
        path.unlink()
    elif damage == "description":
        one_file(tmp_path, "description.json").write_text("{")
    else:
        np.save(path, np.array([object()]), allow_pickle=True)
        facts = json.loads(one_file(tmp_path, "description.json").read_text())
        facts["files"]["a"] = {"bytes": path.stat().st_size, "crc32": __import__("zlib").crc32(path.read_bytes())}
        one_file(tmp_path, "description.json").write_text(json.dumps(facts))
    assert cache.get("x", KEY, build)["a"].tolist() == list(range(10))
    assert build.calls == 2
    assert cache.get("x", KEY, build)["a"].tolist() == list(range(10))
    assert build.calls == 2


def test_unwritable_folder_builds_in_memory_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    build, cache = Build(), IndexCache(tmp_path / "file" / "cache")
    for _ in range(2):
        assert cache.get("x", KEY, build)["a"].tolist() == list(range(10))
    assert build.calls == 2 and capsys.readouterr().out.count("in memory") == 1


def lock_of(tmp_path: Path, owner: str) -> None:
    """A lock on KEY's folder as another process leaves it."""
    IndexCache(tmp_path).get("x", KEY, Build())
    folder = one_file(tmp_path, "a.npy").parent
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.with_name(folder.name + ".lock").write_text(owner)


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_dead_lock_is_broken(tmp_path: Path) -> None:
    lock_of(tmp_path, json.dumps({"host": socket.gethostname(), "pid": dead_process()}))
    build = Build()
    started = time.monotonic()
    IndexCache(tmp_path, poll_seconds=0.01).get("x", KEY, build)
    assert build.calls == 1 and time.monotonic() - started < 5 and one_file(tmp_path, "a.npy")


def test_old_lock_of_another_machine_is_broken(tmp_path: Path) -> None:
    lock_of(tmp_path, json.dumps({"host": "elsewhere", "pid": 1}))
    (lock,) = tmp_path.glob("*.lock")
    os.utime(lock, (1, 1))
    IndexCache(tmp_path, poll_seconds=0.01).get("x", KEY, Build())
    assert one_file(tmp_path, "a.npy") and not lock.exists()


def test_living_lock_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    lock_of(tmp_path, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    build = Build()
    IndexCache(tmp_path, wait_seconds=0.3, poll_seconds=0.05).get("x", KEY, build)
    assert build.calls == 1 and not list(tmp_path.glob("x-*/a.npy")) and list(tmp_path.glob("*.lock"))


def test_many_at_once_build_once(tmp_path: Path) -> None:
    build = Build()

    def slow() -> Arrays:
        time.sleep(0.2)
        return build()

    results: list[list[int]] = []

    def work() -> None:
        results.append(IndexCache(tmp_path, poll_seconds=0.01).get("x", KEY, slow)["a"].tolist())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(10))] * 8 and build.calls == 1
