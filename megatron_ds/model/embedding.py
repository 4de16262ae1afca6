"""Token and position embeddings; the vocabulary is split over tensor-parallel ranks and may be padded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ds.model.linear import column_linear
from megatron_ds.parallel.collectives import reduce_from
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.parallel.spec import Init, ParamSpec, Split


class Vocab(NamedTuple):
    """Number of token ids, and rows of the embedding once padded so that every rank holds as many."""

    size: int
    padded: int


class VocabParallelEmbedding(nn.Module):
    """Embedding table split by rows; also the output projection when tied.

    Shapes: ids [s, b] -> [s, b, h]; as a head x [s, b, h] -> logits [s, b, v/tp]
    Comm:   lookup: forward all-reduce of the rows; head: backward all-reduce of dX
    """

    def __init__(self, vocab: Vocab, hidden: int, *, init: Init, tp: Axis, **factory: Any):
        super().__init__()
        self.vocab, self.hidden, self.init, self.tp = vocab, hidden, init, tp
        self.rows = vocab.padded // tp.size
        self.weight = nn.Parameter(torch.empty(self.rows, hidden, **factory))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's share of the vocabulary, padding included."""
        return column_linear(x, self.weight, None, self.tp)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        split = Split(0, padded_to=self.vocab.padded)
        return [ParamSpec("weight", (self.vocab.size, self.hidden), self.init, split)]

    def flops_per_token(self) -> int:
        """Forward FLOPs as a head, padding included; a lookup costs none."""
        return 2 * self.vocab.padded * self.hidden


class OutputLayer(VocabParallelEmbedding):
    """An untied output projection: the same split table, used only as a head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's share of the vocabulary."""
        return self.project(x)


class PositionEmbedding(nn.Module):
    """Learned absolute positions.

    Shapes: positions [s, b] -> [s, b, h]
    """

    def __init__(self, max_positions: int, hidden: int, *, init: Init, **factory: Any):
        super().__init__()
        self.shape, self.init = (max_positions, hidden), init
        self.weight = nn.Parameter(torch.empty(self.shape, **factory))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        return F.embedding(positions, self.weight)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        return [ParamSpec("weight", self.shape, self.init)]


class GPTEmbedding(nn.Module):
    """What the first stage does to tokens, and, tied, what the last one multiplies with.

    Shapes: ids, positions [s, b] -> [s, b, h]
    """

    def __init__(
        self,
        vocab: Vocab,
        hidden: int,
        max_positions: int | None,
        *,
        dropout: float,
        init: Init,
        tp: Axis,
        streams: DropoutStreams,
        **factory: Any,
    ):
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(vocab, hidden, init=init, tp=tp, **factory)
        self.position_embeddings = (
            PositionEmbedding(max_positions, hidden, init=init, **factory) if max_positions else None
        )
        self.dropout, self.streams = dropout, streams

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Word plus position rows, with dropout."""
        x: torch.Tensor = self.word_embeddings(ids)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        if self.training and self.dropout:
            self.streams.enter(-1, "embedding")
            x = F.dropout(x, self.dropout)
        return x


class TiedHead(nn.Module):
    """The last stage's copy of a tied embedding table, under the table's own name."""

    def __init__(self, vocab: Vocab, hidden: int, *, init: Init, tp: Axis, **factory: Any):
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(vocab, hidden, init=init, tp=tp, **factory)
