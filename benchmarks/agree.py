"""A few training steps of the package on a device beside the plain-torch peer's on the CPU, from the same weights.

    python benchmarks/agree.py --device cuda

Exits with 1 if a loss or gradient norm differs by more than rounding explains.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peer import TINY, PeerStep, random_batch
from benchmarks.train_step import OurStep

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
STEPS = 5


def copy_weights(ours: OurStep, peer: PeerStep) -> None:
    """Give our engine the peer's weights, block by block."""
    names = {
        "ln_1": "input_layernorm", "qkv": "self_attention.linear_qkv", "proj": "self_attention.linear_proj",
        "ln_2": "pre_mlp_layernorm", "fc_1": "mlp.linear_fc1", "fc_2": "mlp.linear_fc2",
    }  # fmt: skip
    ends = {
        "words": "embedding.word_embeddings",
        "positions": "embedding.position_embeddings",
        "ln_f": "final_layernorm",
    }
    with torch.no_grad():
        for name, value in peer.model.named_parameters():
            *path, module, leaf = name.split(".")
            prefix = f"layers.{path[-1]}.{names[module]}" if module in names else ends[module]
            ours.engine.optimizer.set_values(f"{prefix}.{leaf}", value.detach().to(ours.device))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device, worst = parser.parse_args().device, 0.0
    for dtype, tolerance in TOLERANCE.items():
        peer, ours = PeerStep(TINY, torch.float32), OurStep(TINY, dtype, device)
        copy_weights(ours, peer)
        for step in range(STEPS):
            batch = random_batch(TINY, step)
            found, expected = ours.step(tuple(part.to(device) for part in batch)), peer.step(batch)
            pairs = {"loss": (found, expected), "grad norm": (ours.grad_norm, peer.grad_norm)}
            for name, (mine, theirs) in pairs.items():
                error = abs(mine - theirs) / theirs
                worst = max(worst, error / tolerance)
                print(f"{dtype} step {step} {name}: ours on {device} {mine:.6f}, peer on cpu {theirs:.6f}, {error:.1e}")
    print("agree" if worst <= 1 else "DISAGREE")
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
