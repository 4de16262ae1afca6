"""The peer: the same GPT trained by plain torch, as a competent user would write it without any framework.

Fused operators throughout (SDPA, cross-entropy, AdamW), fp32 weights, autocast for bf16, optionally torch.compile.
benchmarks/train_step.py runs it beside ours; on a GPU both run under the caller's `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import (
    BETAS,
    CLIP_GRAD,
    EPS,
    LEARNING_RATE,
    TINY,
    W1,
    W2,
    WEIGHT_DECAY,
    WORKLOADS,
    Batch,
    Workload,
    random_batch,
)

__all__ = ["TINY", "W1", "W2", "WORKLOADS", "Batch", "Block", "PeerGPT", "PeerStep", "Workload", "random_batch"]


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, w: Workload):
        super().__init__()
        self.heads = w.heads
        self.ln_1 = nn.LayerNorm(w.hidden)
        self.qkv = nn.Linear(w.hidden, 3 * w.hidden)
        self.proj = nn.Linear(w.hidden, w.hidden)
        self.ln_2 = nn.LayerNorm(w.hidden)
        self.fc_1 = nn.Linear(w.hidden, 4 * w.hidden)
        self.fc_2 = nn.Linear(4 * w.hidden, w.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [b, s, h] -> [b, s, h]"""
        b, s, h = x.shape
        q, k, v = (
            part.view(b, s, self.heads, -1).transpose(1, 2) for part in torch.split(self.qkv(self.ln_1(x)), h, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, h))
        out: Tensor = x + self.fc_2(F.gelu(self.fc_1(self.ln_2(x)), approximate="tanh"))
        return out


class PeerGPT(nn.Module):
    """Decoder-only transformer with a tied head; its forward returns the mean loss."""

    def __init__(self, w: Workload):
        super().__init__()
        self.words = nn.Embedding(w.vocab, w.hidden)
        self.positions = nn.Embedding(w.seq, w.hidden)
        self.blocks = nn.ModuleList(Block(w) for _ in range(w.layers))
        self.ln_f = nn.LayerNorm(w.hidden)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "fc_2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * w.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Shapes: [b, s], [b, s] -> []"""
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PeerStep:
    """One optimizer step of a peer: accumulate over micro-batches, clip, AdamW.

    model: takes the parts of a batch and returns the mean loss; the plain GPT with weights of the seed if None.
    """

    def __init__(
        self,
        workload: Workload,
        dtype: torch.dtype,
        compile: bool = False,
        device: str = "cpu",
        seed: int = 0,
        model: nn.Module | None = None,
    ):
        torch.manual_seed(seed)
        self.workload, self.dtype, self.device = workload, dtype, torch.device(device)
        self.model = (PeerGPT(workload) if model is None else model).to(self.device)
        self.run = torch.compile(self.model) if compile else self.model
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
        self.grad_norm = math.nan

    @property
    def num_parameters(self) -> int:
        """Each parameter once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.workload.tokens_per_step

    def step(self, batch: Batch) -> float:
        """Train on one global batch and return its mean loss; done when it returns, on a GPU too."""
        total = torch.zeros((), device=self.device)
        pieces = (torch.split(part.to(self.device, non_blocking=True), self.workload.micro) for part in batch)
        for parts in zip(*pieces, strict=True):
            with self._autocast():
                loss = self.run(*parts) / self.workload.micro_batches
            loss.backward()
            total += loss.detach()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.grad_norm = grad_norm.item()
        return total.item()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
