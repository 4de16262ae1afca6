"""Every operation of every source of kernels beside plain torch on a device, there and back: no pytest needed.

    python benchmarks/check_kernels.py --device cuda

The package tries each kernel in the same way before it chooses it; here all are tried, and what one lacks is said.
Exits with 1 if one disagrees.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ds.kernels import proof
from megatron_ds.kernels.choose import OFFERS, OPERATIONS, REFERENCE


def main(argv: list[str] | None = None) -> int:
    """Print a line for each source and operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sources", default=",".join(name for name in OFFERS if name != "reference"))
    options = parser.parse_args(argv)
    device, wrong = torch.device(options.device), 0
    for source in options.sources.split(","):
        offer = OFFERS[source](device)
        if offer.lacks:
            print(f"{source}: left out, {offer.lacks}")
            continue
        for operation in OPERATIONS:
            why = None if operation in offer.makers else "has none"
            why = why or offer.op_lacks(operation)
            if why:
                print(f"{source} {operation}: left out, {why}")
                continue
            kernel = offer.makers[operation]()
            for dtype in proof.TOLERANCE:
                found = proof.disagreement(operation, kernel, REFERENCE[operation], device, dtype)
                wrong += found is not None
                print(f"{source} {operation} {str(dtype).removeprefix('torch.')}: {found or 'agrees'}", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
