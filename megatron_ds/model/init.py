"""Initial weights that depend on a parameter's global name and the seed, never on the layout.

Rows are drawn in blocks, each from a generator seeded by (seed, name, block), on the CPU and in fp32, so that a rank
draws only the blocks that it holds and a GPU job starts from the same numbers as a CPU job.
"""

from __future__ import annotations

import torch

from megatron_ds.parallel.rng import stream_seed
from megatron_ds.parallel.spec import Box, ParamSpec

ROWS_PER_BLOCK = 64


def initial_values(spec: ParamSpec, seed: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The local tensor's initial values in fp32; padding rows are zero.

    Shapes: -> spec.local_shape(tp_size)
    """
    if spec.init.kind == "ones":
        return torch.ones(spec.local_shape(tp_size))
    local = torch.zeros(spec.local_shape(tp_size))
    if spec.init.kind == "normal":
        for region in spec.regions(tp_rank, tp_size):
            local[region.local.slices()] = _normal(spec, seed, region.globe)
    return local


def _normal(spec: ParamSpec, seed: int, box: Box) -> torch.Tensor:
    """The values of one box of the global tensor."""
    out = torch.empty(box.shape)
    generator = torch.Generator()
    first, stop = box.start[0], box.start[0] + box.shape[0]
    for block in range(first // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK)):
        row = block * ROWS_PER_BLOCK
        rows = min(ROWS_PER_BLOCK, spec.shape[0] - row)
        generator.manual_seed(stream_seed(seed, spec.name, block))
        drawn = torch.empty(rows, *spec.shape[1:]).normal_(0.0, spec.init.std, generator=generator)
        here = Box((row, *(0 for _ in spec.shape[1:])), tuple(drawn.shape)).intersect(box)
        assert here is not None
        out[here.slices(box.start)] = drawn[here.slices((row, *(0 for _ in spec.shape[1:])))]
    return out
