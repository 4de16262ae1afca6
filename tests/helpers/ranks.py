"""Plain functions on N gloo ranks of this machine, fast enough to use in every test.

    def worker(scale: int) -> float: ...        # at module level; initialises torch.distributed from the environment
    run_ranks(worker, 4, 10)                    # -> [value of rank 0, ..., value of rank 3]

Ranks are forked from a server that has torch and megatron_ds in memory already: the first call waits for the server (a
few seconds), the others cost tenths of a second. Each rank is a process of its own with the environment that torchrun
would give it, one thread, and no GPU in sight.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

FIRST_PORT, LAST_PORT = 20_000, 32_000
"""Below the range from which Linux and macOS take outgoing ports, so nobody grabs one between our check and its use."""

GRACE_S = 1.0
"""How long after the first failure the other ranks may still report theirs."""


class RankFailed(Exception):
    """One rank of `run_ranks` raised, exited or died; the first to do so if there were several."""

    def __init__(self, rank: int, traceback: str, exit_code: int | None, exit_codes: Sequence[int | None]):
        super().__init__(f"rank {rank} of {len(exit_codes)} failed, exit codes {list(exit_codes)}\n{traceback}")
        self.rank = rank
        self.traceback = traceback
        self.exit_code = exit_code
        """1 for an exception, the code of a SystemExit, minus the number of a deadly signal."""
        self.exit_codes = tuple(exit_codes)
        """The same for every rank; None for one that returned or was still running when it was killed."""


class RanksTimedOut(RankFailed):
    """Some ranks were still running when the time was up; `traceback` shows where each of them stood."""


@dataclass(frozen=True)
class Report:
    """What a rank has to say at its end."""

    returned: bool
    value: bytes = b""
    """What `fn` returned, pickled on the rank so that a value which cannot travel is the rank's error."""
    traceback: str = ""
    exit_code: int | None = None
    time_s: float = 0.0


@dataclass
class _Rank:
    rank: int
    process: ForkServerProcess
    pipe: Connection
    stack_file: Path
    report: Report | None = None


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(*args)` on every rank and return what each returned, in rank order.

    Raises: RankFailed if a rank raises, exits or dies; RanksTimedOut if one is still running after `timeout_s`
    """
    job = pickle.dumps((fn, args))
    context = _fork_server()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(world_size):
                environment = {**os.environ, **address, "LOCAL_WORLD_SIZE": str(world_size), **_rank_variables(rank)}
                stack_file = Path(folder, f"{rank}.txt")
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_rank_main, args=(job, environment, stack_file, theirs), name=f"rank{rank}"
                )
                process.start()
                theirs.close()
                ranks.append(_Rank(rank, process, ours, stack_file))
            _collect(ranks, timeout_s)
            return _results(ranks, timeout_s)
        finally:
            for one in ranks:
                one.process.kill()
                one.pipe.close()
            for one in ranks:
                one.process.join(5)


def _rank_variables(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    search_path = os.pathsep.join(path for path in sys.path if path)
    with _environment({"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(FIRST_PORT, LAST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _rank_main(job: bytes, environment: dict[str, str], stack_file: Path, pipe: Connection) -> NoReturn:
    """The life of one rank: run, report, and stay until all have reported (rank 0 hosts the others' store)."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        report = _run(job)
        _flush()
        pipe.send(report)
        if report.returned:
            with contextlib.suppress(EOFError, OSError):
                pipe.recv_bytes()
    os._exit(report.exit_code or 0)


def _run(job: bytes) -> Report:
    try:
        fn, args = pickle.loads(job)
        return Report(True, value=pickle.dumps(fn(*args)))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Report(False, b"", traceback.format_exc(), code, time.monotonic())
    except BaseException:
        return Report(False, b"", traceback.format_exc(), 1, time.monotonic())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _collect(ranks: list[_Rank], timeout_s: float) -> None:
    """Take reports until all have one, the time is up, or a failure is `GRACE_S` old."""
    deadline, failed = time.monotonic() + timeout_s, False
    waiting = {one.pipe: one for one in ranks}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for pipe in ready:
            assert isinstance(pipe, Connection)
            one = waiting.pop(pipe)
            one.report = _receive(one)
            if not one.report.returned and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)


def _receive(one: _Rank) -> Report:
    try:
        report = one.pipe.recv()
        assert isinstance(report, Report)
        return report
    except (EOFError, OSError):
        one.process.join(5)
        code = one.process.exitcode
        # Time 0: the others' errors follow from this death, however late the kernel tells us of it.
        return Report(False, b"", f"the process died without a Python exception ({_death(code)})", code, 0.0)


def _death(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _results(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    codes = [one.report.exit_code if one.report else None for one in ranks]
    failures = [(one.report.time_s, one.rank, one.report) for one in ranks if one.report and not one.report.returned]
    if failures:
        _, rank, report = min(failures, key=lambda failure: failure[:2])
        raise RankFailed(rank, report.traceback, report.exit_code, codes)
    hung = [one for one in ranks if one.report is None]
    if hung:
        stacks = "\n".join(f"rank {one.rank}:\n{_stack(one)}" for one in hung)
        raise RanksTimedOut(hung[0].rank, f"still running after {timeout_s:g} s\n{stacks}", None, codes)
    return [pickle.loads(one.report.value) for one in ranks if one.report]


def _stack(one: _Rank) -> str:
    """Where a hung rank stands; written by a signal handler that needs neither the GIL nor the rank's cooperation."""
    if one.process.pid is not None:
        os.kill(one.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        time.sleep(0.05)
        text = one.stack_file.read_text() if one.stack_file.exists() else ""
        if text:
            return text
    return "(no answer)"
