"""Built index arrays kept on disk, so that only the first process of the first run builds them.

One folder per key, `NAME-HASH/`, holding one .npy per array and `description.json` (the key, and size and checksum of
each file). It is written under another name and renamed, so it is complete or absent. Nothing here is a collective: a
process that does not find its folder takes `NAME-HASH.lock` and builds, the others poll. The lock only saves work:
whoever builds at the same time makes the same arrays, and the first rename wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ds import log

Arrays = dict[str, npt.NDArray[Any]]


class IndexCache:
    """A folder of built arrays; without a folder everything is built in memory.

    `wait_seconds` is how long to wait for another process's build before building privately; a lock of another machine
    counts as dead after `foreign_lock_seconds`, one of this machine when its process is gone.
    """

    def __init__(
        self,
        directory: Path | None,
        wait_seconds: float = 1800.0,
        foreign_lock_seconds: float = 3600.0,
        poll_seconds: float = 0.2,
    ):
        self.directory = directory
        self.wait_seconds = wait_seconds
        self.foreign_lock_seconds = foreign_lock_seconds
        self.poll_seconds = poll_seconds
        self._reported = False

    def get(self, name: str, key: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays under `key`, from the folder or from `build`."""
        if self.directory is None:
            return build()
        text = json.dumps(key, sort_keys=True)
        folder = self.directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        try:
            return self._get(folder, text, build)
        except OSError as exc:
            return self._build_in_memory(exc, build)

    def _get(self, folder: Path, text: str, build: Callable[[], Arrays]) -> Arrays:
        started, announced = time.monotonic(), False
        while time.monotonic() - started < self.wait_seconds:
            found = _load(folder, text)
            if found is not None:
                return found
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(folder.with_name(folder.name + ".lock")) as held:
                if held:
                    return _load(folder, text) or _build_and_store(folder, text, build)
            if not announced:
                announced = True
                log.info(f"another process builds {folder.name}: waiting for it")
            log.progress(f"waiting for another process to build {folder.name} ({time.monotonic() - started:.0f} s)")
            time.sleep(self.poll_seconds)
        log.info(f"nobody finished {folder} in {self.wait_seconds:.0f} s: building it in memory")
        return build()

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[bool]:
        """Whether this process holds the lock for the time of the `with`."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if self._is_dead(path):
                log.info(f"removing the lock of a process that is gone: {path}")
                path.unlink(missing_ok=True)
            yield False
            return
        try:
            with open(descriptor, "w") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
            yield True
        finally:
            path.unlink(missing_ok=True)

    def _is_dead(self, path: Path) -> bool:
        try:
            age = time.time() - path.stat().st_mtime
            owner = json.loads(path.read_text())
            if owner["host"] == socket.gethostname():
                return not _is_alive(int(owner["pid"]))
        except FileNotFoundError:
            return False
        except (ValueError, TypeError, KeyError):
            # Between its creation and its first write a lock is empty.
            return age > 10.0
        return age > self.foreign_lock_seconds

    def _build_in_memory(self, exc: OSError, build: Callable[[], Arrays]) -> Arrays:
        if not self._reported:
            self._reported = True
            log.info(
                f"cannot write {self.directory} ({exc.strerror}): building indices in memory (see --data-cache-path)"
            )
        return build()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _load(folder: Path, text: str) -> Arrays | None:
    """The arrays of a folder; None where it is absent, and where it is damaged, which also removes it."""
    try:
        described = json.loads((folder / "description.json").read_text())
        if described["key"] != text:
            raise ValueError("another key")
        arrays = {name: _load_array(folder / f"{name}.npy", facts) for name, facts in described["files"].items()}
    except FileNotFoundError:
        if not folder.is_dir():
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    else:
        return arrays
    log.info(f"damaged index cache, built again: {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _load_array(path: Path, facts: Mapping[str, int]) -> npt.NDArray[Any]:
    if path.stat().st_size != facts["bytes"] or _checksum(path) != facts["crc32"]:
        raise ValueError("size or checksum")
    loaded: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return loaded


def _build_and_store(folder: Path, text: str, build: Callable[[], Arrays]) -> Arrays:
    arrays = build()
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        temporary.mkdir()
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values, allow_pickle=False)
        files = {path.stem: {"bytes": path.stat().st_size, "crc32": _checksum(path)} for path in temporary.iterdir()}
        (temporary / "description.json").write_text(json.dumps({"key": text, "files": files}, indent=1))
        temporary.rename(folder)
    except OSError as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            log.info(f"cannot keep {folder} ({exc.strerror}): it will be built again next time")
    return arrays


def _checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total
