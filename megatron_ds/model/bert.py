"""BERT: one pipeline chunk of it, for masked words and the order of two segments."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ds.model.chunk import Lengths, ModelChunk, Stage
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.heads import MaskedLMHead
from megatron_ds.model.layer import Shared, TransformerLayer
from megatron_ds.model.linear import ReplicatedLinear
from megatron_ds.model.norm import Norm


class BertModel(ModelChunk):
    """Layers that see both ways; on the last chunk the masked-LM head and, from the first position, the binary one.

    Shapes: tokens, token_types, positions, labels [b, s/cp], documents [b, s], is_random [b]; upstream [s/cp, b, h] ->
            [s/cp, b, h] (sequence parallel: s/cp/tp); on the last chunk losses [s/cp, b] and [b], or without labels
            logits [s/cp, b, v/tp] and [b, 2]; None for the second without a binary head
    """

    def __init__(self, config: TransformerConfig, vocab: Vocab, stage: Stage, **options: Any):
        super().__init__(config, vocab, stage, **options)
        assert config.hidden_size
        layers = range(stage.start, stage.stop)
        self.layers = nn.ModuleDict({str(i): TransformerLayer(config, i, causal=False, **self.shared) for i in layers})
        if stage.is_last:
            made = {"init": self.init, **self.shared}
            self.final_layernorm = Norm(config, **self.shared)
            self.lm_head = MaskedLMHead(config, vocab, **made)
            if config.has_sentence_order:
                self.pooler = ReplicatedLinear(config.hidden_size, config.hidden_size, **made)
                self.binary_head = ReplicatedLinear(config.hidden_size, 2, **made)
        self._build_output()

    def forward(
        self,
        tokens: torch.Tensor,
        token_types: torch.Tensor,
        documents: torch.Tensor,
        upstream: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        is_random: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Run this chunk."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embedding(tokens.t(), positions.t(), token_types.t()) if upstream is None else upstream
        shared = Shared(self._rope(positions), self._mask(tokens.shape[1], False, documents))
        x = self._run(list(self.layers.values()), x, shared)
        if not self.stage.is_last:
            return x
        x = self.final_layernorm(x)
        order = self.binary_head(torch.tanh(self.pooler(x[0]))) if self.config.has_sentence_order else None
        logits = self._logits(self.lm_head(x), self.lm_head.bias)
        if labels is None:
            return logits, order
        losses = self._token_losses(logits, labels)
        return losses, self._order_losses(order, is_random)

    def _order_losses(self, order: torch.Tensor | None, is_random: torch.Tensor | None) -> torch.Tensor | None:
        """Zero where another rank holds the first position of the sequence, which alone is looked at."""
        if order is None or is_random is None:
            return None
        losses = F.cross_entropy(order.float(), is_random, reduction="none")
        return losses if self.runtime.shards.sequence_shard == 0 else losses * 0

    def _positions_of(self, name: str, lengths: Lengths) -> tuple[int, int]:
        one = name in ("pooler", "binary_head")
        return (1, 1) if one else super()._positions_of(name, lengths)
