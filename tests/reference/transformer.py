"""What the three oracles are made of, in plain torch, written to be read beside the formulas.

It shares no code with megatron_ds; only the global parameter names and the row order of the fused matrices are agreed:
`linear_qkv` holds all queries, then all keys, then all values; a gated `linear_fc1` holds the gate, then the up half.

Shapes: b batch, s sequence, h hidden, a query heads, k key-value heads, d head size, f mlp, v vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What defines the function whichever the model; the defaults are GPT-2's style."""

    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    max_positions: int
    head_size: int | None = None
    """Default: hidden / heads."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_1p: bool = False
    """The parameter is the norm's weight minus one."""
    activation: str = "gelu_tanh"
    """gelu_tanh, gelu, relu, squared_relu; gated: swiglu, geglu, reglu, liglu."""
    bias: bool = True
    qkv_bias: bool = True
    softmax_scale: float | None = None
    """Default: 1 / sqrt(d)."""
    tied: bool = True

    @property
    def d(self) -> int:
        """Size of a head."""
        return self.head_size or self.hidden // self.heads

    @property
    def gated(self) -> bool:
        """True where fc1 has two halves."""
        return self.activation.endswith("glu")

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return 1 / math.sqrt(self.d) if self.softmax_scale is None else self.softmax_scale


def norm_shapes(name: str, c: TransformerConfig, width: int | None = None) -> Shapes:
    """Weight, and of a LayerNorm the bias."""
    kinds = ("weight", "bias") if c.norm == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (width or c.hidden,) for kind in kinds}


def linear_shapes(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    """Weight [rows, columns], bias [rows]."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def self_attention_shapes(at: str, c: TransformerConfig) -> Shapes:
    """The fused queries, keys and values, and the output projection."""
    qkv = linear_shapes(f"{at}.linear_qkv", (c.heads + 2 * c.kv_heads) * c.d, c.hidden, c.qkv_bias)
    return qkv | linear_shapes(f"{at}.linear_proj", c.hidden, c.heads * c.d, c.bias)


def mlp_shapes(at: str, c: TransformerConfig) -> Shapes:
    """Both linears."""
    fc1 = linear_shapes(f"{at}.linear_fc1", 2 * c.ffn if c.gated else c.ffn, c.hidden, c.bias)
    return fc1 | linear_shapes(f"{at}.linear_fc2", c.hidden, c.ffn, c.bias)


def draw(shapes: Shapes, c: TransformerConfig, seed: int, std: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters with nothing left at zero or one, so that a forgotten bias or norm weight shows."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes.items():
        x = std * torch.randn(shape, generator=generator, dtype=torch.float64)
        params[name] = (x + 1 if name.endswith("norm.weight") and not c.norm_1p else x).to(dtype)
    return params


def under(params: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters of one layer, by their names in it."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def norm(p: Mapping[str, Tensor], name: str, c: TransformerConfig, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, or x / sqrt(mean(x^2) + eps) * weight."""
    weight = p[f"{name}.weight"] + 1 if c.norm_1p else p[f"{name}.weight"]
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight
    return x + p[f"{name}.bias"] if c.norm == "layernorm" else x


def linear(p: Mapping[str, Tensor], name: str, bias: bool, x: Tensor) -> Tensor:
    """x W^T + bias."""
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if bias else y


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: Tensor) -> Tensor:
    """x where it is positive."""
    return x * (x > 0)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": relu,
    "squared_relu": lambda x: relu(x) ** 2,
    "swiglu": lambda x: x * torch.sigmoid(x),
    "geglu": gelu_tanh,
    "reglu": relu,
    "liglu": lambda x: x,
}
"""Of a gated MLP: what is done to the gate."""


def mlp(p: Mapping[str, Tensor], c: TransformerConfig, x: Tensor) -> Tensor:
    """fc2(act(fc1 x)), or fc2(act(gate) * up)."""
    y, act = linear(p, "mlp.linear_fc1", c.bias, x), ACTIVATIONS[c.activation]
    if c.gated:
        gate, up = y.chunk(2, dim=-1)
        y = act(gate) * up
    else:
        y = act(y)
    return linear(p, "mlp.linear_fc2", c.bias, y)


def by_head(x: Tensor, d: int) -> Tensor:
    """Shapes: [b, s, n * d] -> [b, n, s, d]"""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def queries_keys_values(p: Mapping[str, Tensor], c: TransformerConfig, x: Tensor) -> tuple[Tensor, ...]:
    """The three parts of `linear_qkv`.

    Shapes: x [b, s, h] -> [b, a, s, d], [b, k, s, d], [b, k, s, d]
    """
    qkv = linear(p, "self_attention.linear_qkv", c.qkv_bias, x)
    sizes = [c.heads * c.d, c.kv_heads * c.d, c.kv_heads * c.d]
    return tuple(by_head(part, c.d) for part in torch.split(qkv, sizes, dim=-1))


def attend(
    c: TransformerConfig, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | float = 0.0
) -> Tensor:
    """softmax(q k^T * scale + bias) v over the allowed keys; query head i reads key-value head i // (a / k).

    Shapes: q [b, a, s, d], k and v [b, k, t, d], allowed like [b, a, s, t] -> [b, s, a * d]
    """
    reads = torch.arange(c.heads) // (c.heads // k.shape[1])
    scores = q @ k[:, reads].transpose(-1, -2) * c.scale + bias
    mixed = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v[:, reads]
    return mixed.transpose(1, 2).flatten(2)


def causal(s: int) -> Tensor:
    """Shapes: [query, key]"""
    return torch.ones(s, s, dtype=torch.bool).tril()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]; a label of -1 stands where nothing is asked, and gets that of 0.

    Shapes: [..., v], [...] -> [...]
    """
    return logits.logsumexp(-1) - logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
