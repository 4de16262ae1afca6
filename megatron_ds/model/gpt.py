"""GPT: one pipeline chunk of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_ds.model.chunk import ModelChunk, Stage
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.layer import Shared, TransformerLayer
from megatron_ds.model.norm import Norm

__all__ = ["GPTModel", "Stage"]


class GPTModel(ModelChunk):
    """Causal layers; on the first chunk the embeddings, on the last final norm, head and loss.

    Shapes: tokens, labels, positions [b, s/cp], documents [b, s]; upstream [s/cp, b, h] -> [s/cp, b, h] (sequence
            parallel: s/cp/tp), on the last chunk losses [s/cp, b] or, without labels, logits [s/cp, b, v/tp]
    """

    def __init__(self, config: TransformerConfig, vocab: Vocab, stage: Stage, **options: Any):
        super().__init__(config, vocab, stage, **options)
        layers = range(stage.start, stage.stop)
        self.layers = nn.ModuleDict({str(i): TransformerLayer(config, i, causal=True, **self.shared) for i in layers})
        if stage.is_last:
            self.final_layernorm = Norm(config, **self.shared)
        self._build_output()

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        upstream: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this chunk."""
        x = self.embedding(tokens.t(), positions.t()) if upstream is None else upstream
        shared = Shared(self._rope(positions), self._mask(tokens.shape[1], True, documents))
        x = self._run(list(self.layers.values()), x, shared)
        if not self.stage.is_last:
            return x
        logits = self._logits(self.final_layernorm(x))
        if labels is None:
            return logits
        return self._token_losses(logits, labels)
