"""Token and position embeddings; the vocabulary is split over tensor-parallel ranks and may be padded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_ds.model.config import TOKEN_TYPES, TransformerConfig
from megatron_ds.model.linear import column_linear
from megatron_ds.model.norm import Norm
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

    is_looked_up = True
    """False where it is only a head."""

    def __init__(self, vocab: Vocab, hidden: int, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.vocab, self.hidden, self.init, self.runtime = vocab, hidden, init, runtime
        self.rows = vocab.padded // runtime.shards.tp.size
        self.weight = nn.Parameter(torch.empty(self.rows, hidden, **factory))

    def forward(self, ids: torch.Tensor, more: bool = False) -> torch.Tensor:
        """Rows of the table; `more`: another lookup's gradient follows this one's in the same backward."""
        tp = self.runtime.shards.tp
        if tp.size == 1:
            return _lookup(ids, self.weight, self.runtime, more)
        local = ids - tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        found = _lookup(local.masked_fill(elsewhere, 0), self.weight, self.runtime, more)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return reduce_scatter_from(found, tp) if self.runtime.shards.sequence_parallel else reduce_from(found, tp)

    def project(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of this rank's share of the vocabulary, padding included."""
        head = self.runtime.kernels.head
        return column_linear(x, self.weight, bias, self.runtime, head, more=self.is_looked_up)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        split = Split(0, padded_to=self.vocab.padded)
        return [ParamSpec("weight", (self.vocab.size, self.hidden), self.init, split)]

    def flops_per_token(self) -> int:
        """Forward FLOPs as a head, padding included; a lookup costs none."""
        return 2 * self.vocab.padded * self.hidden


class _Lookup(torch.autograd.Function):
    """Rows of a table, whose gradient goes straight to the main gradients: only the rows that were used are touched."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, runtime: Runtime, more: bool) -> torch.Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.main, ctx.more = runtime.weight_grads.main, more
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        ids, weight = ctx.saved_tensors
        ctx.main.accumulate_rows(weight, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]), ctx.more)
        return None, None, None, None


def _lookup(ids: torch.Tensor, weight: torch.Tensor, runtime: Runtime, more: bool) -> torch.Tensor:
    """F.embedding.

    Shapes: ids [s, b], weight [v/tp, h] -> [s, b, h]
    """
    if runtime.weight_grads.main is None:
        return F.embedding(ids, weight)
    out: torch.Tensor = _Lookup.apply(ids, weight, runtime, more)
    return out


class OutputLayer(VocabParallelEmbedding):
    """An untied output projection: the same split table, used only as a head."""

    is_looked_up = False

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Logits of this rank's share of the vocabulary."""
        return self.project(x, bias)


class Table(nn.Module):
    """Learned rows for positions or token types, replicated over tp.

    Shapes: numbers [s, b] -> [s, b, h] (sequence parallel: [s/tp, b, h])
    """

    def __init__(self, rows: int, hidden: int, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.shape, self.init, self.runtime = (rows, hidden), init, runtime
        self.weight = nn.Parameter(torch.empty(self.shape, **factory))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows of the table."""
        shards = self.runtime.shards
        if shards.sequence_parallel:
            numbers = numbers.chunk(shards.tp.size)[shards.tp.rank]
        return F.embedding(numbers, self.weight)

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        return [ParamSpec("weight", self.shape, self.init, partial_over=self.runtime.shards.partial_over)]


class Embedding(nn.Module):
    """What the first stage does to tokens, and, tied, what the last one multiplies with.

    Shapes: ids, positions, types [s, b] -> [s, b, h] (sequence parallel: [s/tp, b, h])
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab: Vocab,
        max_positions: int,
        *,
        init: Init,
        runtime: Runtime,
        **factory: Any,
    ):
        super().__init__()
        assert config.hidden_size
        table = {"init": init, "runtime": runtime, **factory}
        learned, typed = config.positions == "learned_absolute", config.has_sentence_order
        self.word_embeddings = VocabParallelEmbedding(vocab, config.hidden_size, **table)
        self.position_embeddings = Table(max_positions, config.hidden_size, **table) if learned else None
        self.tokentype_embeddings = Table(TOKEN_TYPES, config.hidden_size, **table) if typed else None
        self.norm = Norm(config, runtime=runtime, **factory) if config.embed_layernorm else None
        self.dropout, self.runtime = config.hidden_dropout, runtime

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        types: torch.Tensor | None = None,
        *,
        site: str = "embedding",
        more: bool = False,
    ) -> torch.Tensor:
        """The sum of their rows, normalised if asked for, with dropout under the name of `site`.

        more: words are looked up once more, and that gradient comes later in the backward.
        """
        x: torch.Tensor = self.word_embeddings(ids, more)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        if self.tokentype_embeddings is not None and types is not None:
            x = x + self.tokentype_embeddings(types)
        if self.norm is not None:
            x = self.norm(x)
        if self.runtime.fp32_residual:
            x = x.float()
        if self.training and self.dropout:
            self.runtime.streams.enter(-1, site, self.runtime.shards.sequence_shard)
            x = F.dropout(x, self.dropout)
        return x


class TiedHead(nn.Module):
    """The last stage's copy of a tied embedding table, under the table's own name."""

    def __init__(self, vocab: Vocab, hidden: int, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        self.word_embeddings = OutputLayer(vocab, hidden, init=init, runtime=runtime, **factory)


class RelativeBias(nn.Module):
    """What a head adds to scores by the distance of query and key: a row per bucket of distances, a column per head.

    Shapes: weight [buckets, a/tp]
    """

    def __init__(self, config: TransformerConfig, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__()
        assert config.num_attention_heads
        self.shape, self.init = (config.relative_attention_num_buckets, config.num_attention_heads), init
        heads = config.num_attention_heads // runtime.shards.tp.size
        self.weight = nn.Parameter(torch.empty(self.shape[0], heads, **factory))

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        return [ParamSpec("weight", self.shape, self.init, Split(1))]
