"""GPT: one pipeline chunk of it, with the parameter table that everyone else reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_ds.kernels.rope import rope_table
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import GPTEmbedding, OutputLayer, TiedHead, Vocab
from megatron_ds.model.layer import Norm, TransformerLayer
from megatron_ds.model.loss import vocab_parallel_cross_entropy
from megatron_ds.model.recompute import recomputed
from megatron_ds.model.runtime import Runtime
from megatron_ds.parallel.spec import Init, ParamSpec


class Stage(NamedTuple):
    """Which part of the stack a chunk holds: layers [start, stop), and whether the two ends of the model are here."""

    start: int
    stop: int
    is_first: bool
    is_last: bool


class GPTModel(nn.Module):
    """The layers of one chunk; on the first the embeddings, on the last final norm, head and loss.

    Parameter names are global: layers are numbered over the whole model, and a tied head bears the embedding's name.
    Shapes: tokens, labels, positions [b, s/cp]; upstream [s/cp, b, h] -> [s/cp, b, h] (sequence parallel: s/cp/tp), on
            the last chunk losses [s/cp, b] or, without labels, logits [s/cp, b, v/tp]
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab: Vocab,
        stage: Stage,
        *,
        max_positions: int,
        runtime: Runtime | None = None,
        **factory: Any,
    ):
        super().__init__()
        assert config.hidden_size
        self.config, self.vocab, self.stage, self.runtime = config, vocab, stage, runtime or Runtime()
        self.tied = not config.untie_embeddings_and_output_weights
        self.dtype = factory.get("dtype", torch.get_default_dtype())
        shared = {"runtime": self.runtime, **factory}
        table = {"init": Init("normal", config.init_method_std), **shared}
        if stage.is_first:
            positions = None if config.uses_rope else max_positions
            dropout = config.hidden_dropout
            self.embedding: nn.Module = GPTEmbedding(vocab, config.hidden_size, positions, dropout=dropout, **table)
        elif stage.is_last and self.tied:
            self.embedding = TiedHead(vocab, config.hidden_size, **table)
        layers = range(stage.start, stage.stop)
        self.layers = nn.ModuleDict({str(i): TransformerLayer(config, i, **shared) for i in layers})
        if stage.is_last:
            self.final_layernorm = Norm(config, **shared)
            if not self.tied:
                self.output_layer = OutputLayer(vocab, config.hidden_size, **table)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        upstream: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this chunk."""
        x = self.embedding(tokens.t(), positions.t()) if upstream is None else upstream
        rope = None
        if self.config.uses_rope:
            rope = rope_table(positions.t(), self.config.rotated, self.config.rotary_base, self.dtype)
        for layers, recompute in self._groups():
            run = partial(_through, layers, rope)
            x = recomputed(run, self.runtime, x, whole_layers=True) if recompute else run(x)
        if not self.stage.is_last:
            return x
        x = self.final_layernorm(x)
        logits = self.embedding.word_embeddings.project(x) if self.tied else self.output_layer(x)  # type: ignore
        if labels is None:
            return logits  # type: ignore[no-any-return]
        return vocab_parallel_cross_entropy(logits, labels.t(), self.vocab, self.runtime.shards.tp)

    def _groups(self) -> Iterator[tuple[list[nn.Module], bool]]:
        """Layers that run together, and whether they are recomputed."""
        layers, recompute = list(self.layers.values()), self.runtime.recompute
        if recompute.granularity != "full":
            yield layers, False
        elif recompute.method == "uniform":
            for first in range(0, len(layers), recompute.num_layers):
                yield layers[first : first + recompute.num_layers], True
        else:
            yield from (([layer], True) for layer in layers[: recompute.num_layers])
            yield layers[recompute.num_layers :], False

    def table(self) -> dict[str, ParamSpec]:
        """The parameter table of this chunk, by global name."""
        rows = {}
        for prefix, module in self.named_modules():
            if hasattr(module, "specs"):
                for row in module.specs():
                    rows[f"{prefix}.{row.name}"] = dataclasses.replace(row, name=f"{prefix}.{row.name}")
        shared = "embedding.word_embeddings.weight"
        if self.tied and shared in rows and not (self.stage.is_first and self.stage.is_last):
            assert not rows[shared].partial_over
            rows[shared] = dataclasses.replace(
                rows[shared], partial_over=("embedding",), owned_by_first_stage=not self.stage.is_first
            )
        assert rows.keys() == dict(self.named_parameters()).keys()
        return rows

    def flops_per_token(self, seq_length: int) -> int:
        """Forward FLOPs per token of this chunk, all tensor-parallel ranks together; matrix products only."""
        return sum(self._flops(seq_length))

    def _flops(self, seq_length: int) -> Iterator[int]:
        for name, module in self.named_modules():
            if name.endswith("word_embeddings"):
                yield module.flops_per_token() if self.tied and self.stage.is_last else 0
            elif hasattr(module, "flops_per_token") and module is not self:
                yield module.flops_per_token()
            if hasattr(module, "attention_flops"):
                yield module.attention_flops(seq_length)


def _through(layers: Sequence[nn.Module], rope: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x, rope)
    return x
