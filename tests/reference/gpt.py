"""The oracle: a GPT and its training on one process, in plain torch, written to be read beside the formulas.

It shares no code with megatron_ds; only the global parameter names and the row order of the fused matrices are agreed:
`linear_qkv` holds all queries, then all keys, then all values; a gated `linear_fc1` holds the gate, then the up half.

Shapes: b batch, s sequence, h hidden, a query heads, k key-value heads, d head size, f mlp, v vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GlobalBatch = tuple[Tensor, Tensor, Tensor]
"""Tokens, labels and loss mask, each [global batch, s]."""


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """What defines the function; the defaults are GPT-2's style."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    max_positions: int
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    swiglu: bool = False
    bias: bool = True
    qkv_bias: bool = True
    positions: Literal["learned", "rope"] = "learned"
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    tied: bool = True


@dataclass(frozen=True)
class Trained:
    """What a run of `train` leaves behind."""

    history: list[tuple[float, float]]
    """Loss and gradient norm (before clipping) of every step."""
    params: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    """Of every step, before clipping; empty unless asked for."""


def parameter_shapes(c: OracleConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model with its global shape, in the order of the forward pass."""
    h, d = c.hidden, c.hidden // c.heads
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (c.vocab, h)}
    if c.positions == "learned":
        shapes["embedding.position_embeddings.weight"] = (c.max_positions, h)
    for i in range(c.num_layers):
        at = f"layers.{i}."
        shapes |= _norm_shapes(at + "input_layernorm", c)
        shapes |= _linear_shapes(at + "self_attention.linear_qkv", (c.heads + 2 * c.kv_heads) * d, h, c.qkv_bias)
        shapes |= _linear_shapes(at + "self_attention.linear_proj", h, c.heads * d, c.bias)
        shapes |= _norm_shapes(at + "pre_mlp_layernorm", c)
        shapes |= _linear_shapes(at + "mlp.linear_fc1", 2 * c.ffn if c.swiglu else c.ffn, h, c.bias)
        shapes |= _linear_shapes(at + "mlp.linear_fc2", h, c.ffn, c.bias)
    shapes |= _norm_shapes("final_layernorm", c)
    return shapes if c.tied else shapes | {"output_layer.weight": (c.vocab, h)}


def _norm_shapes(name: str, c: OracleConfig) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias") if c.norm == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (c.hidden,) for kind in names}


def _linear_shapes(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def random_params(
    c: OracleConfig, seed: int = 0, std: float = 0.1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Parameters with nothing left at zero or one, so that a forgotten bias or norm weight shows."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in parameter_shapes(c).items():
        x = std * torch.randn(shape, generator=generator, dtype=torch.float64)
        params[name] = (x + 1 if "layernorm.weight" in name else x).to(dtype)
    return params


def forward(params: Mapping[str, Tensor], c: OracleConfig, tokens: Tensor) -> Tensor:
    """Logits of a decoder-only transformer.

    Shapes: tokens [b, s] -> [b, s, v]
    """
    words = params["embedding.word_embeddings.weight"]
    x = words[tokens]
    if c.positions == "learned":
        x = x + params["embedding.position_embeddings.weight"][: tokens.shape[1]]
    for i in range(c.num_layers):
        p = {name.removeprefix(f"layers.{i}."): value for name, value in params.items()}
        x = x + attention(p, c, norm(p, "input_layernorm", c, x))
        x = x + mlp(p, c, norm(p, "pre_mlp_layernorm", c, x))
    x = norm(params, "final_layernorm", c, x)
    return x @ (words if c.tied else params["output_layer.weight"]).T


def norm(p: Mapping[str, Tensor], name: str, c: OracleConfig, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, or x / sqrt(mean(x^2) + eps) * weight."""
    if c.norm == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[f"{name}.weight"]
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(p: Mapping[str, Tensor], name: str, bias: bool, x: Tensor) -> Tensor:
    """x W^T + bias."""
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if bias else y


def attention(p: Mapping[str, Tensor], c: OracleConfig, x: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v; query head i reads key-value head i // (a / k)."""
    b, s, _ = x.shape
    a, k, d = c.heads, c.kv_heads, c.hidden // c.heads
    qkv = linear(p, "self_attention.linear_qkv", c.qkv_bias, x)
    q, key, value = (
        part.view(b, s, -1, d).transpose(1, 2) for part in torch.split(qkv, [a * d, k * d, k * d], dim=-1)
    )  # each [b, heads, s, d]
    if c.positions == "rope":
        q, key = rotate(q, c), rotate(key, c)
    reads = torch.arange(a) // (a // k)
    scores = q @ key[:, reads].transpose(-1, -2) / math.sqrt(d)  # [b, a, s, s]
    later = torch.ones(s, s, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    mixed = scores.softmax(-1) @ value[:, reads]
    return linear(p, "self_attention.linear_proj", c.bias, mixed.transpose(1, 2).reshape(b, s, a * d))


def rotate(x: Tensor, c: OracleConfig) -> Tensor:
    """Turn the feature pair (i, i + r/2) at position t by the angle t * base^(-2i/r); the features beyond r stay.

    Shapes: x [b, heads, s, d]
    """
    r = int(x.shape[-1] * c.rotary_percent)
    turns = c.rotary_base ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)
    angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * turns  # [s, r/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second, rest = torch.split(x, [r // 2, r // 2, x.shape[-1] - r], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def mlp(p: Mapping[str, Tensor], c: OracleConfig, x: Tensor) -> Tensor:
    """fc2(gelu(fc1 x)), or fc2(silu(gate) * up)."""
    y = linear(p, "mlp.linear_fc1", c.bias, x)
    if c.swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * up
    else:
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return linear(p, "mlp.linear_fc2", c.bias, y)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label].

    Shapes: [b, s, v], [b, s] -> [b, s]
    """
    return logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]


def loss(params: Mapping[str, Tensor], c: OracleConfig, tokens: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean loss over the tokens that the mask keeps."""
    losses = token_losses(forward(params, c, tokens), labels)
    return (losses * loss_mask).sum() / loss_mask.sum()


def train(
    params: Mapping[str, Tensor],
    c: OracleConfig,
    global_batches: Sequence[GlobalBatch],
    *,
    lr_at: Callable[[int], float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_grad: float = 1.0,
    micro_batch: int | None = None,
    keep_gradients: bool = False,
) -> Trained:
    """AdamW from zero moments, one step per global batch; step i (from 0) uses lr_at(i). `clip_grad` 0: no clipping.

    `micro_batch` bounds the sequences held at once and changes only rounding. The given `params` are not touched.
    """
    weights = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    decayed = [w for w in weights.values() if w.dim() == 2]
    others = [w for w in weights.values() if w.dim() != 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=False, fused=False)
    trained = Trained([], {}, [])
    for step, batch in enumerate(global_batches):
        optimizer.zero_grad()
        value = _accumulate(weights, c, batch, micro_batch)
        if keep_gradients:
            trained.gradients.append({name: _gradient(w).clone() for name, w in weights.items()})
        size = torch.nn.utils.clip_grad_norm_(weights.values(), clip_grad or math.inf, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
        trained.history.append((value, size.item()))
    trained.params.update({name: w.detach() for name, w in weights.items()})
    return trained


def _accumulate(weights: Mapping[str, Tensor], c: OracleConfig, batch: GlobalBatch, micro_batch: int | None) -> float:
    """Add up the gradients of sum(l * mask) / sum(mask) over the global batch, micro-batch by micro-batch."""
    kept, value = batch[2].sum(), 0.0
    size = micro_batch or len(batch[0])
    for tokens, labels, mask in zip(*(torch.split(part, size) for part in batch), strict=True):
        part = (token_losses(forward(weights, c, tokens), labels) * mask).sum() / kept
        part.backward()
        value += part.item()
    return value


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
