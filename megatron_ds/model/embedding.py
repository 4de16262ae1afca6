"""Token and position embeddings; the vocabulary is split over tensor-parallel ranks and may be padded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ds.model.linear import column_linear
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.collectives import reduce_from, reduce_scatter_from
from megatron_ds.parallel.spec import Init, ParamSpec, Split


class Vocab(NamedTuple):
    """Number of token ids, and rows of the embedding once padded so that every rank holds as many."""

    size: int
    padded: int


class VocabParallelEmbedding(nn.Module):
    """Embedding table split by rows; also the output projection when tied.

    Shapes: ids [s, b] -> [s, b, h]; as a head x [s, b, h] -> logits [s, b, v/tp]; sequence parallel: [s/tp, b, h]
    Comm:   lookup: forward all-reduce of the rows (SP: reduce-scatter); head: as a column-parallel linear
    """

    def __init__(self, vocab: Vocab, hidden: int, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.vocab, self.hidden, self.init, self.runtime = vocab, hidden, init, runtime
        self.rows = vocab.padded // runtime.shards.tp.size
        self.weight = nn.Parameter(torch.empty(self.rows, hidden, **factory))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        tp = self.runtime.shards.tp
        if tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return reduce_scatter_from(found, tp) if self.runtime.shards.sequence_parallel else reduce_from(found, tp)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's share of the vocabulary, padding included."""
        return column_linear(x, self.weight, None, self.runtime)

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

    Shapes: positions [s, b] -> [s, b, h] (sequence parallel: [s/tp, b, h])
    """

    def __init__(self, max_positions: int, hidden: int, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.shape, self.init, self.runtime = (max_positions, hidden), init, runtime
        self.weight = nn.Parameter(torch.empty(self.shape, **factory))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        shards = self.runtime.shards
        if shards.sequence_parallel:
            positions = positions.chunk(shards.tp.size)[shards.tp.rank]
        return F.embedding(positions, self.weight)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        return [ParamSpec("weight", self.shape, self.init, partial_over=self.runtime.shards.partial_over)]


class GPTEmbedding(nn.Module):
    """What the first stage does to tokens, and, tied, what the last one multiplies with.

    Shapes: ids, positions [s, b] -> [s, b, h] (sequence parallel: [s/tp, b, h])
    """

    def __init__(
        self,
        vocab: Vocab,
        hidden: int,
        max_positions: int | None,
        *,
        dropout: float,
        init: Init,
        runtime: Runtime,
        **factory: Any,
    ):
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(vocab, hidden, init=init, runtime=runtime, **factory)
        self.position_embeddings = (
            PositionEmbedding(max_positions, hidden, init=init, runtime=runtime, **factory) if max_positions else None
        )
        self.dropout, self.runtime = dropout, runtime

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Word plus position rows, with dropout."""
        x: torch.Tensor = self.word_embeddings(ids)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        if self.runtime.fp32_residual:
            x = x.float()
        if self.training and self.dropout:
            self.runtime.streams.enter(-1, "embedding", self.runtime.shards.sequence_shard)
            x = F.dropout(x, self.dropout)
        return x


class TiedHead(nn.Module):
    """The last stage's copy of a tied embedding table, under the table's own name."""

    def __init__(self, vocab: Vocab, hidden: int, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(vocab, hidden, init=init, runtime=runtime, **factory)
