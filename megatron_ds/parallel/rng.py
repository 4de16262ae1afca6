"""Named random streams for dropout: each mask is a function of (seed, sample, layer, site), not of what ran before.

torch's default generator is the one honest global of this package, and it is reseeded here only. Nothing about it has
to be saved: a resumed run, a recomputed layer and another pipeline or data-parallel layout draw the same masks. Where
ranks hold different parts of one activation (heads over tp; the sequence over cp, and with sequence parallelism over
tp) each part has a stream of its own, so that there masks depend on the layout.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


def stream_seed(*names: object) -> int:
    """A 63-bit seed for a stream, the same on every machine and Python version."""
    digest = hashlib.blake2b(":".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class DropoutStreams:
    """Seeds the generator before each dropout. `sample` is the global row number of the micro-batch's first sample."""

    seed: int
    sample: int = 0
    device_type: str = "cpu"

    def enter(self, layer: int, site: str, part: object = 0) -> None:
        """Begin the stream of one dropout; `part` says which of its elements this rank holds."""
        seed = stream_seed(self.seed, self.sample, layer, site, part)
        # torch.manual_seed would seed every kind of device, which takes ten times as long.
        if self.device_type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
