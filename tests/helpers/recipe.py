"""pretrain_gpt.py in this process or as ranks of its own: what it printed, how it left, and what it wrote."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import pretrain_gpt
from megatron_ds.data.indexed_builder import IndexedDatasetBuilder
from megatron_ds.training.pretrain import pretrain

VOCAB = 101
"""Ids of the tiny model's data: NullTokenizer's 100 numbers and its end of document."""

Value = str | int | float | bool | None

TINY: dict[str, Value] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "train_iters": 2,
    "lr": 1e-3,
    "eval_iters": 1,
    "eval_interval": 2,
    "log_interval": 1,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": VOCAB - 1,
    "device": "cpu",
}
"""A run of a second."""


class Outcome(NamedTuple):
    """Of one run: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def words(flags: Mapping[str, Value]) -> list[str]:
    """{"tp_size": 2, "bf16": True, "load": None} -> ["--tp-size", "2", "--bf16"]; True is a flag without a value."""
    out: list[str] = []
    for name, value in flags.items():
        if value is not None and value is not False:
            out += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return out


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without any launcher's traces, and with `variables`."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launchers and not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables


def run(argv: Sequence[str], **variables: str) -> Outcome:
    """Run the recipe in this process, alone or as the rank that `variables` say."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    os.environ.clear()
    os.environ.update(environment(**variables) | {"OMP_NUM_THREADS": before.get("OMP_NUM_THREADS", "1")})
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            _pretrain(argv)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    finally:
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


def write_tokens(prefix: Path, documents: int = 20, length: int = 50, largest: int | None = None) -> None:
    """A .bin/.idx pair of random ids below VOCAB, without a sidecar; `largest` is put into the last document."""
    draw = np.random.default_rng(0)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetBuilder(str(prefix), np.uint16) as builder:
        for number in range(documents):
            ids = draw.integers(0, VOCAB, length)
            if largest is not None and number == documents - 1:
                ids[3] = largest
            builder.add_document(ids, [length])
        builder.finalize()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def free_port() -> int:
    """A port below the range that outgoing connections take theirs from."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def as_rank(argv: Sequence[str]) -> str:
    """On a rank of `run_ranks`: run the recipe with the environment as it is; what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        _pretrain(argv)
    return out.getvalue()


def _pretrain(argv: Sequence[str]) -> None:
    pretrain(
        pretrain_gpt.train_valid_test_datasets_provider,
        pretrain_gpt.model_provider,
        pretrain_gpt.forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        argv=list(argv),
    )
