"""What all of these kernels share: the decorator, under a type, and the sizes of a program's tile.

Sizes follow from the width of a row and nothing is tuned at start: a start costs no more than the compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

jit: Callable[[Callable[..., Any]], Any] = triton.jit
"""triton.jit, which has no types of its own."""

ELEMENTS = 1024
"""Elements of a tile of narrow rows: eight a thread, which is 16 bytes of bf16."""


class Tile(NamedTuple):
    """Rows and columns (powers of two) that one program works on, and its warps."""

    rows: int
    columns: int
    warps: int


def whole_rows(width: int) -> Tile:
    """A tile of rows that are reduced, so that each has to lie in one program."""
    columns: int = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // columns)
    return Tile(rows, columns, min(16, max(4, rows * columns // 512)))


def pieces(width: int) -> Tile:
    """A tile for elementwise work on rows of any width."""
    columns = min(ELEMENTS, triton.next_power_of_2(width))
    return Tile(ELEMENTS // columns, columns, 4)


def tiles(rows: int, width: int, tile: Tile) -> tuple[int]:
    """The grid that covers a matrix; a tile's columns vary fastest."""
    return (-(-rows // tile.rows) * -(-width // tile.columns),)


@functools.cache
def resident_programs(device: torch.device) -> int:
    """Programs that keep the whole device busy when each walks over many tiles."""
    if device.type != "cuda":
        return 3  # only Triton's interpreter comes here; uneven shares, so that tests meet them
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def column_sums(t: torch.Tensor) -> torch.Tensor:
    """Sums over all dims but the last, in fp32: the gradient of a bias, which repeats bit by bit.

    Shapes: t [..., h] -> [h]
    """
    width = t.shape[-1]
    return t.reshape(t.numel() // max(1, width), width).sum(0, dtype=torch.float32)
