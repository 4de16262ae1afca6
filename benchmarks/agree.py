"""A few training steps of each model on a device beside the plain-torch peer's on the CPU, from the same weights.

    python benchmarks/agree.py --device cuda

Exits with 1 if a loss or gradient norm differs by more than rounding explains.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ours import OurStep
from benchmarks.peers_common import save_initial_weights
from benchmarks.peers_single import build
from benchmarks.workloads import TINY, TINY_BERT, TINY_LLAMA, TINY_T5, Workload, random_batch

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
STEPS = 5


def compare(workload: Workload, dtype: str, device: str, flags: str) -> float:
    """The largest difference as a share of what rounding explains."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        save_initial_weights(workload, weights)
        peer = build("torch", workload, torch.float32, "cpu", weights)
        ours = OurStep(workload, dtype, device, weights, flags)
    for step in range(STEPS):
        batch = random_batch(workload, step)
        found, expected = ours.step(batch), peer.step(batch)
        pairs = {"loss": (found, expected), "grad norm": (ours.grad_norm, peer.grad_norm)}
        for name, (mine, theirs) in pairs.items():
            error = abs(mine - theirs) / theirs
            worst = max(worst, error / TOLERANCE[dtype])
            what = f"{workload.name} {dtype} {flags} step {step} {name}"
            print(f"{what}: ours on {device} {mine:.6f}, peer on cpu {theirs:.6f}, {error:.1e}")
    return worst


def main() -> int:
    """0 where all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--our-flags", default="", help="more flags of the package: --our-flags='...'")
    options = parser.parse_args()
    models = (TINY, TINY_LLAMA, TINY_BERT, TINY_T5)
    worst = max(compare(w, dtype, options.device, options.our_flags) for w in models for dtype in TOLERANCE)
    print("agree" if worst <= 1 else "DISAGREE")
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
