#!/usr/bin/env python3
"""Write the logits and the loss of given tokens.

    python tools/forward.py --load runs/gpt/checkpoints --input ids.npz --output logits.npz

Reads a checkpoint of any layout on any layout: alone, or under torchrun with --tensor-model-parallel-size and
--pipeline-model-parallel-size. Inputs and outputs bear the names that transformers gives them (docs/evaluation.md).
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from megatron_ds import log
from megatron_ds.cli import Parser, arg
from megatron_ds.errors import EXIT_OK, ConfigError, DataError, RunFault
from megatron_ds.parallel.collectives import barrier
from megatron_ds.training.inference import InferenceConfig, check_output, guarded, open_checkpoint
from megatron_ds.training.outputs import model_outputs


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """Input and output."""

    input: str | None = arg(None, "Arrays of whole numbers: input_ids and what else the model reads.", metavar="NPZ")
    output: str | None = arg(None, "Where logits, loss and the like go, in fp32.", metavar="NPZ")
    micro_batch_size: int = arg(8, "Rows at a time; the result does not depend on it.")
    decoder_start_token_id: int = arg(0, "T5: begins what decoder inputs are made of when only labels are given.")


def read_arrays(path: str) -> dict[str, torch.Tensor]:
    """Every array of an .npz, as int64.

    Raises: DataError for a file that is none, or arrays of anything but whole numbers
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        found = getattr(error, "strerror", None) or "no .npz file"
        raise DataError(
            f"--input {path}", found, "arrays saved by numpy.savez", "np.savez(path, input_ids=...)"
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biu":
            raise DataError(f"--input: {name}", str(array.dtype), "whole numbers", f"{name}.astype('int64')")
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


def write_arrays(path: str, arrays: Mapping[str, torch.Tensor]) -> None:
    """Write an .npz whole or not at all, under the very name that was given.

    Raises: RunFault if the disk does not take it
    """
    staged = f"{path}.tmp"
    try:
        with open(staged, "wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in arrays.items()})  # type: ignore[arg-type]
        os.replace(staged, path)
    except OSError as error:
        raise RunFault(f"--output {path}", error.strerror or str(error), "a file that can be written") from error


def work(argv: Sequence[str]) -> int:
    """Load, run, write; the exit code."""
    parser = Parser("forward.py", (__doc__ or "").splitlines()[0])
    for group in (ForwardConfig, InferenceConfig):
        parser.add_config(group)
    typed = parser.read(argv)
    (files,), (options,) = parser.build([ForwardConfig], typed, {}), parser.build([InferenceConfig], typed, {})
    if files.input is None or files.output is None:
        flag = "--input" if files.input is None else "--output"
        raise ConfigError(flag, "nothing", "an .npz file", f"{flag} {'ids' if files.input is None else 'logits'}.npz")
    if files.micro_batch_size < 1:
        raise ConfigError("--micro-batch-size", str(files.micro_batch_size), "1 or more", "leave it out")
    check_output("--output", files.output)
    given = read_arrays(files.input)
    trained = open_checkpoint(options)
    found = model_outputs(
        trained,
        given,
        micro_batch_size=files.micro_batch_size,
        decoder_start_token_id=files.decoder_start_token_id,
    )
    if trained.writes:
        write_arrays(files.output, found)
    barrier(trained.parallel.world)
    log.info(f"{files.output}: {trained.config.model_type} of iteration {trained.iteration}")
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; its exit code."""
    return guarded(lambda: work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
