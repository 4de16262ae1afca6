"""T5: one pipeline chunk of it.

Note [One stream through two stacks]
    Encoder and decoder are one stack of layers, encoder first, that a pipeline may cut anywhere. What travels from
    chunk to chunk is one tensor of positions on top of each other: those of the encoder, those of the decoder, and,
    with relative positions, some rows that hold the two small tables of biases.

        first chunk     embeds both sequences (one embedding, on one stage)
        encoder layer   changes the first part
        decoder layer   changes the second part, attending to the first, which by then is the encoder's output
        last chunk      final norm and head of the second part

    So no weight but the tied embedding lives on two stages: what every decoder layer needs of the encoder, and every
    layer of the tables, arrives with the activations, and its gradient goes back with theirs. The price: encoder stages
    pass the decoder's embeddings on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ds.kernels.mask import Rule, relative_buckets, visible, with_bias
from megatron_ds.model.chunk import Lengths, ModelChunk, Stage
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import RelativeBias, Vocab
from megatron_ds.model.heads import LogitBias
from megatron_ds.model.layer import Shared, TransformerLayer
from megatron_ds.model.norm import Norm

Tables = tuple[torch.Tensor, torch.Tensor]
"""Relative biases of the encoder and of the decoder, each [buckets, a/tp]."""


class _Stack(nn.Module):
    """The layers of an encoder or a decoder that a chunk holds, and the norm behind the last of all."""

    def __init__(self, layers: dict[str, TransformerLayer], norm: Norm | None):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.final_layernorm = norm


class T5Model(ModelChunk):
    """An encoder that sees both ways and a causal decoder that attends to it; see Note [One stream through two stacks].

    Shapes: encoder_tokens, encoder_documents [b, se], decoder_tokens, labels [b, sd]; upstream and result
            [se + sd + rows, b, h] (sequence parallel: [(se + sd)/tp + rows, b, h]), on the last chunk losses [sd, b]
            or, without labels, logits [sd, b, v/tp]
    Source: Raffel et al. 2020, arXiv:1910.10683
    """

    def __init__(self, config: TransformerConfig, vocab: Vocab, stage: Stage, **options: Any):
        super().__init__(config, vocab, stage, **options)
        self.relative = config.positions == "relative"
        if stage.is_first and self.relative:
            self.embedding.encoder_bias = RelativeBias(config, init=self.init, **self.shared)
            self.embedding.decoder_bias = RelativeBias(config, init=self.init, **self.shared)
        self.encoder, self.decoder = self._stack(False), self._stack(True)
        if stage.is_last:
            self.lm_head = LogitBias(config, vocab, **self.shared)
        self._build_output()

    def _stack(self, decodes: bool) -> _Stack:
        config, stage, before = self.config, self.stage, self.config.encoder_layers
        here = range(stage.start, stage.stop)
        layers = {
            str(i - before * decodes): TransformerLayer(config, i, causal=decodes, crosses=decodes, **self.shared)
            for i in here
            if (i >= before) == decodes
        }
        ends = (config.total_layers if decodes else before) - 1 in here
        return _Stack(layers, Norm(config, **self.shared) if ends else None)

    def forward(
        self,
        encoder_tokens: torch.Tensor,
        decoder_tokens: torch.Tensor,
        encoder_documents: torch.Tensor,
        upstream: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this chunk."""
        lengths = Lengths(encoder_tokens.shape[1], decoder_tokens.shape[1])
        if upstream is None:
            source, target, tables = self._embed(encoder_tokens, decoder_tokens)
        else:
            source, target, tables = self._unpack(upstream, lengths)
        encoder, decoder = list(self.encoder.layers.values()), list(self.decoder.layers.values())
        if encoder:
            rule = Rule.of_padding(encoder_documents, encoder_documents)
            bias = self._bias(tables, rule)
            shared = Shared(self._rope(_count(encoder_tokens)), None if tables else self.runtime.kernels.mask(rule))
            source = self._run(encoder, source, shared, bias=bias)
        if self.encoder.final_layernorm is not None:
            source = self.encoder.final_layernorm(source).to(source.dtype)
        if decoder:
            cross = Rule.of_padding(torch.zeros_like(decoder_tokens), encoder_documents)
            shared = Shared(self._rope(_count(decoder_tokens)), cross_mask=self.runtime.kernels.mask(cross))
            # Padding of the decoder needs no mask: it follows the tokens, which see nothing later.
            bias = self._bias(tables, Rule(lengths.decoder, lengths.decoder, True, device=target.device))
            memory = source.to(self.dtype)  # where it comes in fp32 it is normed all the same
            target = self._run(decoder, target, shared, bias=bias, memory=memory, skipped=len(encoder))
        if not self.stage.is_last:
            return self._pack(source, target, tables)
        assert self.decoder.final_layernorm is not None
        return self._head(self.decoder.final_layernorm(target), labels)

    def _head(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        if self.config.scale_decoder_outputs:
            x = x * x.shape[-1] ** -0.5
        logits = self._logits(x, self.lm_head())
        if labels is None:
            return logits
        return self._token_losses(logits, labels)

    def _embed(self, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Tables | None]:
        # The decoder's gradient is always the first: what the encoder's words get has come through the encoder.
        embedded = (
            self.embedding(source.t(), _count(source).t()),
            self.embedding(target.t(), _count(target).t(), site="decoder embedding", more=True),
        )
        if not self.relative:
            return *embedded, None
        return *embedded, (self.embedding.encoder_bias.weight, self.embedding.decoder_bias.weight)  # type: ignore

    def _pack(self, source: torch.Tensor, target: torch.Tensor, tables: Tables | None) -> torch.Tensor:
        """Everything as one tensor."""
        if tables is None:
            return torch.cat((source, target))
        flat = torch.cat([table.to(source.dtype).flatten() for table in tables])
        row = source[0].numel()
        rows = F.pad(flat, (0, -flat.numel() % row)).view(-1, *source.shape[1:])
        return torch.cat((source, target, rows))

    def _unpack(self, stream: torch.Tensor, lengths: Lengths) -> tuple[torch.Tensor, torch.Tensor, Tables | None]:
        """The parts of what the chunk before this one has packed."""
        share = self.runtime.shards.tp.size if self.runtime.shards.sequence_parallel else 1
        source, target = lengths.tokens // share, lengths.decoder // share
        parts = stream.split((source, target, len(stream) - source - target))
        if not self.relative:
            return parts[0], parts[1], None
        shape = self._table_shape()
        both = parts[2].flatten()[: 2 * shape.numel()].to(self.dtype).view(2, *shape)
        return parts[0], parts[1], (both[0], both[1])

    def _table_shape(self) -> torch.Size:
        assert self.config.num_attention_heads
        heads = self.config.num_attention_heads // self.runtime.shards.tp.size
        return torch.Size((self.config.relative_attention_num_buckets, heads))

    def _bias(self, tables: Tables | None, rule: Rule) -> torch.Tensor | None:
        """What relative positions add to scores, -inf where the rule hides a key; causal is the decoder.

        Shapes: -> [b or 1, a/tp, s, s]
        """
        if tables is None:
            return None
        table = tables[1 if rule.causal else 0]
        buckets = relative_buckets(
            rule.queries,
            rule.keys,
            bidirectional=not rule.causal,
            buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
            device=table.device,
        )
        bias = F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)
        return with_bias(visible(rule), bias, rule.causal)

    def wire_shape(self, lengths: Lengths, micro_batch_size: int) -> tuple[int, int, int]:
        """What a rank sends to the next stage; see `_pack`."""
        source, b, h = super().wire_shape(lengths, micro_batch_size)
        target, _, _ = super().wire_shape(Lengths(lengths.decoder), micro_batch_size)
        rows = -(-2 * self._table_shape().numel() // (b * h)) if self.relative else 0
        return source + target + rows, b, h

    def _positions_of(self, name: str, lengths: Lengths) -> tuple[int, int]:
        if name.startswith("encoder") or name.endswith("linear_kv"):
            return lengths.tokens, lengths.tokens
        return lengths.decoder, lengths.tokens if name.endswith("cross_attention") else lengths.decoder


def _count(tokens: torch.Tensor) -> torch.Tensor:
    """Positions 0, 1, 2 ... of every row."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
