"""BERT, T5 and Llama in plain torch, beside peer.py's GPT: fused operators, parameters named as the package names them.

The forward of each takes the parts of a batch (workloads.py) and returns the mean loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peer import PeerGPT
from benchmarks.workloads import Workload

BUCKETS, FAR = 32, 128
"""Of T5's relative positions: rows of the table, and the distance from which on all share the last."""


class Attention(nn.Module):
    """Self-attention with fused, possibly grouped, projections; with `crosses` its keys and values are of a memory."""

    def __init__(self, w: Workload, *, bias: bool, causal: bool = False, crosses: bool = False):
        super().__init__()
        self.sizes, self.size, self.causal = (w.heads, w.kv_heads or w.heads), w.hidden // w.heads, causal
        queries, pair = w.hidden, 2 * self.sizes[1] * self.size
        if crosses:
            self.linear_q = nn.Linear(w.hidden, queries, bias)
            self.linear_kv = nn.Linear(w.hidden, pair, bias)
        else:
            self.linear_qkv = nn.Linear(w.hidden, queries + pair, bias)
        self.linear_proj = nn.Linear(w.hidden, w.hidden, bias)
        self.scale = 1.0 if w.model == "t5" else self.size**-0.5

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        """Shapes: [b, s, h], memory [b, m, h], mask broadcastable to [b, a, s, m], rope [2, s, d] -> [b, s, h]"""
        heads, kv_heads = self.sizes
        if memory is None:
            q, kv = self.linear_qkv(x).split((heads * self.size, 2 * kv_heads * self.size), dim=-1)
        else:
            q, kv = self.linear_q(x), self.linear_kv(memory)
        k, v = kv.chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (q, k, v))
        if rope is not None:
            q, k = turn(q, rope), turn(k, rope)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal and mask is None, scale=self.scale, enable_gqa=heads != kv_heads
        )
        out: Tensor = self.linear_proj(y.transpose(1, 2).flatten(2))
        return out


def turn(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary positions.

    Shapes: x [b, a, s, d], rope [2, s, d]
    """
    low, high = x.chunk(2, dim=-1)
    return (x * rope[0] + torch.cat((-high, low), dim=-1) * rope[1]).to(x.dtype)


class MLP(nn.Module):
    """Two matrices with an activation between them: gelu (erf), relu, or swiglu, whose first matrix is two."""

    def __init__(self, w: Workload, activation: str, bias: bool):
        super().__init__()
        width, self.activation = w.ffn or 4 * w.hidden, activation
        self.linear_fc1 = nn.Linear(w.hidden, width * (2 if activation == "swiglu" else 1), bias)
        self.linear_fc2 = nn.Linear(width, w.hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [b, s, h] -> [b, s, h]"""
        y = self.linear_fc1(x)
        if self.activation == "swiglu":
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        else:
            y = F.gelu(y) if self.activation == "gelu" else F.relu(y)
        out: Tensor = self.linear_fc2(y)
        return out


class Layer(nn.Module):
    """Residual branches; BERT's residuals leave behind the norms."""

    def __init__(self, w: Workload, *, causal: bool = False, crosses: bool = False):
        super().__init__()
        bert = w.model == "bert"
        self.post_norm = bert
        self.input_layernorm, self.pre_mlp_layernorm = norm(w), norm(w)
        self.self_attention = Attention(w, bias=bert, causal=causal)
        if crosses:
            self.pre_cross_attn_layernorm = norm(w)
            self.cross_attention = Attention(w, bias=bert, crosses=True)
        self.mlp = MLP(w, {"bert": "gelu", "t5": "relu", "llama": "swiglu"}[w.model], bert)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rope: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Shapes: [b, s, h] -> [b, s, h]"""
        y = self.input_layernorm(x)
        x = (y if self.post_norm else x) + self.self_attention(y, mask=mask, rope=rope)
        if memory is not None:
            x = x + self.cross_attention(self.pre_cross_attn_layernorm(x), memory, memory_mask)
        y = self.pre_mlp_layernorm(x)
        return (y if self.post_norm else x) + self.mlp(y)  # type: ignore[no-any-return]


def norm(w: Workload) -> nn.Module:
    """The model's own kind."""
    return nn.LayerNorm(w.hidden, 1e-12) if w.model == "bert" else nn.RMSNorm(w.hidden, 1e-6)


class PeerBERT(nn.Module):
    """Masked words and the order of two segments."""

    def __init__(self, w: Workload):
        super().__init__()
        self.embedding = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(w.vocab, w.hidden),
                "position_embeddings": nn.Embedding(w.seq, w.hidden),
                "tokentype_embeddings": nn.Embedding(2, w.hidden),
            }
        )
        self.layers = nn.ModuleList(Layer(w) for _ in range(w.layers))
        self.final_layernorm = norm(w)
        self.lm_head = nn.Module()
        self.lm_head.dense, self.lm_head.norm = nn.Linear(w.hidden, w.hidden), norm(w)
        self.lm_head.bias = nn.Parameter(torch.zeros(w.vocab))
        self.pooler, self.binary_head = nn.Linear(w.hidden, w.hidden), nn.Linear(w.hidden, 2)

    def forward(
        self, tokens: Tensor, types: Tensor, labels: Tensor, loss_mask: Tensor, documents: Tensor, is_random: Tensor
    ) -> Tensor:
        """Shapes: each [b, s], is_random [b] -> []"""
        words = self.embedding["word_embeddings"]
        x = words(tokens) + self.embedding["position_embeddings"].weight + self.embedding["tokentype_embeddings"](types)
        mask = (documents == 0)[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.final_layernorm(x)
        y = self.lm_head.norm(F.gelu(self.lm_head.dense(x)))
        logits = F.linear(y, words.weight, self.lm_head.bias)
        order = self.binary_head(torch.tanh(self.pooler(x[:, 0])))
        targets = labels.masked_fill(loss_mask == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + F.cross_entropy(order, is_random)


class PeerT5(nn.Module):
    """An encoder, and a causal decoder that attends to it."""

    def __init__(self, w: Workload):
        super().__init__()
        self.hidden = w.hidden
        self.embedding = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(w.vocab, w.hidden),
                "encoder_bias": nn.Embedding(BUCKETS, w.heads),
                "decoder_bias": nn.Embedding(BUCKETS, w.heads),
            }
        )
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(w) for _ in range(w.layers))
        self.decoder.layers = nn.ModuleList(Layer(w, causal=True, crosses=True) for _ in range(w.layers))
        self.encoder.final_layernorm, self.decoder.final_layernorm = norm(w), norm(w)

    def forward(self, source: Tensor, target: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
        """Shapes: source, documents [b, se], target, labels [b, sd] -> []"""
        words = self.embedding["word_embeddings"]
        hidden = (documents == 1)[:, None, None, :]
        x, y = words(source), words(target)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = relative_bias(self.embedding["encoder_bias"], source.shape[1], causal=False)
        mask = bias.masked_fill(hidden, -torch.inf).to(dtype)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        x = self.encoder.final_layernorm(x)
        mask = relative_bias(self.embedding["decoder_bias"], target.shape[1], causal=True).to(dtype)
        seen = (~hidden).expand(-1, 1, target.shape[1], -1)
        for layer in self.decoder.layers:
            y = layer(y, mask, memory=x, memory_mask=seen)
        logits = F.linear(self.decoder.final_layernorm(y) * self.hidden**-0.5, words.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def relative_bias(table: nn.Module, length: int, causal: bool) -> Tensor:
    """What T5 adds to scores: near distances have a row each, far ones share rows by their logarithm.

    Shapes: -> [1, a, s, s]
    Source: Raffel et al. 2020, arXiv:1910.10683, sec. 2.1
    """
    assert isinstance(table, nn.Embedding)
    position = torch.arange(length, device=table.weight.device)
    offset = position[:, None] - position[None, :]  # to the left
    buckets, distance = (BUCKETS, offset.clamp(min=0)) if causal else (BUCKETS // 2, offset.abs())
    exact = buckets // 2
    steps = (distance.clamp(min=1).float() / exact).log() / math.log(FAR / exact) * (buckets - exact)
    row = torch.where(distance < exact, distance, (exact + steps.long()).clamp(max=buckets - 1))
    row = row if causal else row + buckets * (offset < 0)
    bias = table(row).permute(2, 0, 1).unsqueeze(0)
    return bias.masked_fill(offset < 0, -torch.inf) if causal else bias  # type: ignore[no-any-return]


class PeerLlama(nn.Module):
    """RMSNorm, rope, grouped queries, SwiGLU, a tied head."""

    def __init__(self, w: Workload):
        super().__init__()
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(w.vocab, w.hidden)})
        self.layers = nn.ModuleList(Layer(w, causal=True) for _ in range(w.layers))
        self.final_layernorm = norm(w)
        size = w.hidden // w.heads
        angles = torch.arange(w.seq)[:, None] * 10000.0 ** -(torch.arange(0, size, 2) / size)
        angles = angles.repeat(1, 2)
        self.register_buffer("rope", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Shapes: [b, s], [b, s] -> []"""
        words = self.embedding["word_embeddings"]
        x = words(tokens)
        for layer in self.layers:
            x = layer(x, rope=self.rope)
        return F.cross_entropy(F.linear(self.final_layernorm(x), words.weight).flatten(0, 1), labels.flatten())


MODELS: dict[str, type[nn.Module]] = {"gpt": PeerGPT, "bert": PeerBERT, "t5": PeerT5, "llama": PeerLlama}


def build_peer(w: Workload) -> nn.Module:
    """The model in fp32 with normal weights of deviation 0.02, that of residual projections smaller, and no biases."""
    model = MODELS[w.model](w)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("proj.weight", "fc_2.weight", "fc2.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * w.all_layers) if residual else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model
