"""The heads of BERT and T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.linear import ReplicatedLinear
from megatron_ds.model.norm import Norm
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.spec import Init, ParamSpec, Split


class LogitBias(nn.Module):
    """A bias on the logits, split over tp as the vocabulary is; it stands in the model under its module's name.

    Shapes: bias [v/tp]
    """

    def __init__(self, config: TransformerConfig, vocab: Vocab, *, runtime: Runtime, **factory: Any):
        super().__init__()
        self.vocab = vocab
        rows = vocab.padded // runtime.shards.tp.size
        self.bias = nn.Parameter(torch.empty(rows, **factory)) if config.lm_head_bias else None

    def forward(self) -> torch.Tensor | None:
        """The bias itself; it is added where the logits are made."""
        return self.bias

    def specs(self) -> list[ParamSpec]:
        """Rows of the parameter table, under local names."""
        split = Split(0, padded_to=self.vocab.padded)
        bias = ParamSpec("bias", (self.vocab.size,), Init("zeros"), split, decay=False)
        return [bias] if self.bias is not None else []


class MaskedLMHead(LogitBias):
    """What BERT does before it projects to the vocabulary: dense, activation, norm.

    Shapes: x [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])
    Source: Devlin et al. 2018, arXiv:1810.04805, and the code published with it
    """

    def __init__(self, config: TransformerConfig, vocab: Vocab, *, init: Init, runtime: Runtime, **factory: Any):
        super().__init__(config, vocab, runtime=runtime, **factory)
        assert config.hidden_size
        self.dense = ReplicatedLinear(config.hidden_size, config.hidden_size, init=init, runtime=runtime, **factory)
        self.activation = runtime.kernels.activations["gelu_tanh" if config.openai_gelu else "gelu"]
        self.norm = Norm(config, runtime=runtime, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """norm(gelu(x A + b))."""
        out: torch.Tensor = self.norm(self.activation(self.dense(x), None))
        return out
