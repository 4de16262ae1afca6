#!/usr/bin/env python3
"""Say what a checkpoint holds, or in what two of them differ.

    tools/inspect_checkpoint.py DIR [--step N]       iteration, run state, every tensor
    tools/inspect_checkpoint.py DIR_A DIR_B          per tensor: bit-equal, or the largest difference

A DIR is what --save named, or one iter_0000100 in it. Exit code 1 if two checkpoints differ, as with cmp.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_ds.checkpoint.layout import INDEX, Index
from megatron_ds.checkpoint.load import find, load, names, read_index
from megatron_ds.checkpoint.shard import DTYPES
from megatron_ds.errors import EXIT_OK, UserError
from megatron_ds.parallel.spec import Box, Piece


def open_index(directory: str, step: int | None) -> Index:
    """The index of a checkpoint, given its directory or the one above."""
    return read_index(directory) if (Path(directory) / INDEX).exists() else find(directory, step).index


def describe(index: Index) -> None:
    """Print one checkpoint."""
    print(f"{index.path}\niteration {index.iteration}\nstate {json.dumps(index.state, indent=2)}")
    rows, total = [("name", "shape", "dtype", "bytes", "boxes", "files")], 0
    for name in names(index):
        tensor = index.tensors[name]
        nbytes = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        total += nbytes
        files = {stored.file for stored in tensor.boxes}
        rows.append(
            (name, str(list(tensor.shape)), tensor.dtype, f"{nbytes:,}", str(len(tensor.boxes)), str(len(files)))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print(f"{first:{widths[0]}}  " + "  ".join(cells))
    print(f"{len(index.tensors)} tensors, {total:,} bytes, in {len(index.file_bytes)} files")


def compare(a: Index, b: Index) -> bool:
    """Print the differences between two checkpoints; True if there is none."""
    equal = True
    if a.iteration != b.iteration or a.state != b.state:
        print(f"iteration {a.iteration} | {b.iteration}; state {'equal' if a.state == b.state else 'differs'}")
        equal = a.state == b.state
    for name in sorted({*names(a), *names(b)}):
        verdict = _difference(a, b, name)
        equal = equal and verdict == "bit-equal"
        print(f"{name}: {verdict}")
    return equal


def _difference(a: Index, b: Index, name: str) -> str:
    if name not in a.tensors or name not in b.tensors:
        return f"only in {a.path if name in a.tensors else b.path}"
    left, right = a.tensors[name], b.tensors[name]
    if left.shape != right.shape:
        return f"shape {list(left.shape)} | {list(right.shape)}"
    x, y = whole(a, name), whole(b, name)
    if x.dtype == y.dtype and torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)):
        return "bit-equal"
    largest = (x.double() - y.double()).abs().max().item()
    dtypes = "" if x.dtype == y.dtype else f", {left.dtype} | {right.dtype}"
    return f"largest difference {largest:.6g}{dtypes}"


def whole(index: Index, name: str) -> torch.Tensor:
    """One tensor in full."""
    tensor = index.tensors[name]
    values = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    load(index, [Piece(name, tensor.shape, Box((0,) * len(tensor.shape), tensor.shape), values)])
    return values


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("other", metavar="DIR_B", nargs="?")
    parser.add_argument("--step", type=int, help="this iteration instead of the latest")
    args = parser.parse_args(argv)
    try:
        index = open_index(args.directory, args.step)
        if args.other is None:
            describe(index)
            return EXIT_OK
        return EXIT_OK if compare(index, open_index(args.other, args.step)) else 1
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
