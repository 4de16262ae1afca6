"""What every loader returns and every saver takes: one model, its tensors read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ds.data.config import TokenizerConfig
from megatron_ds.model.config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model under our names: whole tensors, the vocabulary without padding.

    names: global parameter names, all of them. read: name -> tensor; nothing is kept, so that a large model is never
    held twice. tokenizer: None where the source says nothing of it. home: the Hugging Face class that it came from.
    decoder_start: the token that T5's decoder was trained to begin with, where that is known.
    """

    config: TransformerConfig
    vocab_size: int
    max_positions: int
    seq_length: int
    decoder_seq_length: int | None = None
    dtype: torch.dtype
    iteration: int
    tokenizer: TokenizerConfig | None
    names: tuple[str, ...]
    read: Callable[[str], torch.Tensor]
    home: str | None = None
    decoder_start: int | None = None
