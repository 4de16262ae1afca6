"""What the chunks of all three models have in common: stacks of layers, the parameter table, FLOPs, the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_ds.kernels.mask import Mask, Rule, alibi_bias, alibi_slopes, visible, with_bias
from megatron_ds.kernels.rope import RopeScaling, rope_frequencies, rope_table
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Embedding, OutputLayer, TiedHead, Vocab
from megatron_ds.model.layer import Shared
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


class Lengths(NamedTuple):
    """Positions of a sample; `decoder` where there are two sequences."""

    tokens: int
    decoder: int = 0


class ModelChunk(nn.Module):
    """One pipeline chunk: on the first the embeddings, on the last the head and what comes before it.

    Parameter names are global: layers are numbered over the whole model, and a tied head bears the embedding's name.
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
        self.init = Init("normal", config.init_method_std)
        self.shared = {"runtime": self.runtime, **factory}
        if stage.is_first:
            self.embedding: nn.Module = Embedding(config, vocab, max_positions, init=self.init, **self.shared)
        elif stage.is_last and self.tied:
            self.embedding = TiedHead(vocab, config.hidden_size, init=self.init, **self.shared)

    def _build_output(self) -> None:
        """An untied output projection, last of all."""
        assert self.config.hidden_size
        if self.stage.is_last and not self.tied:
            self.output_layer = OutputLayer(self.vocab, self.config.hidden_size, init=self.init, **self.shared)

    def _logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Of this rank's share of the vocabulary."""
        head = self.embedding.word_embeddings.project if self.tied else self.output_layer  # type: ignore[union-attr]
        return head(x, bias)  # type: ignore

    def _token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy per token.

        Shapes: logits [s, b, v/tp], labels [b, s] -> [s, b]
        """
        tp, kernel = self.runtime.shards.tp, self.runtime.kernels.cross_entropy
        return vocab_parallel_cross_entropy(logits, labels.t(), self.vocab, tp, kernel)

    def _rope(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Cosines and sines.

        Shapes: positions [b, s] -> [2, s, b, 1, rotated]
        """
        c = self.config
        if not c.uses_rope:
            return None
        stretch = RopeScaling(
            c.rope_scaling_factor,
            c.rope_scaling_low_freq_factor,
            c.rope_scaling_high_freq_factor,
            c.rope_scaling_original_max_position_embeddings,
        )
        interpolation = c.rotary_seq_len_interpolation_factor
        frequencies = rope_frequencies(c.rotated, c.rotary_base, interpolation, stretch if c.use_rope_scaling else None)
        return rope_table(positions.t(), frequencies.to(positions.device, non_blocking=True), self.dtype)

    def _mask(self, length: int, causal: bool, documents: torch.Tensor | None) -> Mask | None:
        """What self-attention over the whole sequence adds to scores, or which keys it sees.

        Shapes: documents [b, s] -> [b or 1, heads or 1, s, s]
        """
        shards, config = self.runtime.shards, self.config
        ways = shards.cp.size if shards.ulysses else 1
        length *= ways
        device = next(self.parameters()).device if documents is None else documents.device
        rule = Rule(length, length, causal, config.window_size, documents, documents, device)
        if config.positions != "alibi":
            return self.runtime.kernels.mask(rule)
        assert config.num_attention_heads
        slopes = alibi_slopes(config.num_attention_heads).to(device, non_blocking=True)
        mine = slopes.chunk(shards.tp.size)[shards.tp.rank].chunk(ways)[shards.cp.rank if ways > 1 else 0]
        return with_bias(visible(rule), alibi_bias(mine, length, length), causal).to(self.dtype)

    def _run(
        self,
        layers: Sequence[nn.Module],
        x: torch.Tensor,
        shared: Shared,
        *,
        bias: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        skipped: int = 0,
    ) -> torch.Tensor:
        """Through all layers of one stack, those that are recomputed in their groups.

        bias: a learned one of self-attention. skipped: layers of the chunk that came before.
        """
        for group, recompute in self._groups(layers, skipped):
            run = partial(_through, group, shared)
            x = recomputed(run, self.runtime, x, memory, bias, streams=1) if recompute else run(x, memory, bias)
        return x

    def _groups(self, layers: Sequence[nn.Module], skipped: int) -> Iterator[tuple[Sequence[nn.Module], bool]]:
        """Layers that run together, and whether they are recomputed."""
        recompute = self.runtime.recompute
        if recompute.granularity != "full":
            yield layers, False
        elif recompute.method == "uniform":
            for first in range(0, len(layers), recompute.num_layers):
                yield layers[first : first + recompute.num_layers], True
        else:
            most = max(0, recompute.num_layers - skipped)
            yield from (([layer], True) for layer in layers[:most])
            yield layers[most:], False

    def wire_shape(self, lengths: Lengths, micro_batch_size: int) -> tuple[int, int, int]:
        """What a rank sends to the next stage.

        Shapes: [s/cp, b, h] (sequence parallel: [s/cp/tp, b, h])
        """
        assert self.config.hidden_size
        shards = self.runtime.shards
        share = shards.cp.size * (shards.tp.size if shards.sequence_parallel else 1)
        return lengths.tokens // share, micro_batch_size, self.config.hidden_size

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

    def flops_per_sample(self, lengths: Lengths) -> int:
        """Forward FLOPs of this chunk, all tensor-parallel ranks together; matrix products only."""
        return sum(self._flops(lengths))

    def _flops(self, lengths: Lengths) -> Iterator[int]:
        for name, module in self.named_modules():
            queries, keys = self._positions_of(name, lengths)
            if name.endswith("word_embeddings"):
                yield module.flops_per_token() * queries if self.tied and self.stage.is_last else 0
            elif hasattr(module, "flops_per_token"):
                yield module.flops_per_token() * queries
            if hasattr(module, "attention_flops"):
                yield module.attention_flops(queries, keys)

    def _positions_of(self, name: str, lengths: Lengths) -> tuple[int, int]:
        """Positions that a module computes of a sample, and that its queries look at."""
        return lengths.tokens, lengths.tokens


def _through(
    layers: Sequence[nn.Module],
    shared: Shared,
    x: torch.Tensor,
    memory: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    for layer in layers:
        x = layer(x, memory, bias, shared)
    return x
