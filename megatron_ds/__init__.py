"""megatron_ds: pretraining GPT, BERT and T5 on any layout of ranks.

The rooms, from the ground up (docs/architecture.md draws them; imports only point down):

    F0  cli errors log timers, every */config.py     flags, user errors, one logger, named timers
    F1  parallel     axes, collectives, parameter splits, named random streams, point-to-point wires
    F2  kernels      one table of fused operations, chosen once
    F3  model data   maths on local tensors | bytes on disk to batches
    F4  pipeline optim checkpoint                    order of work | one optimizer step | pieces to files
    F5  config plan                                  what was asked -> what it implies; needs no device
    F6  training     the only room that introduces rooms to each other
    F7  pretrain_*.py, tools/                        recipes
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from megatron_ds import pretrain`, without importing torch for those who only want the data tools."""
    if name == "pretrain":
        return importlib.import_module("megatron_ds.training.pretrain").pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
