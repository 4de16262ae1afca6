"""What the peers of two processes have in common: model, initial weights, micro-batches, clipping and AdamW."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peer import PeerGPT
from benchmarks.peers_models import build_peer
from benchmarks.workloads import BETAS, CLIP_GRAD, EPS, LEARNING_RATE, WEIGHT_DECAY, Batch, Workload

Precision = Literal["autocast", "weights"]
"""How a peer computes in bf16: fp32 weights and autocast, or bf16 weights and gradients with fp32 masters."""


class GPT(PeerGPT):
    """The plain-torch peer with a cross-entropy in fp32, whatever the weights are."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Shapes: [b, s], [b, s] -> []"""
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def save_initial_weights(workload: Workload, path: Path, seed: int = 0) -> None:
    """The weights that every side starts from, under the names of the plain-torch peer."""
    torch.manual_seed(seed)
    model = PeerGPT(workload) if workload.model == "gpt" else build_peer(workload)
    torch.save(model.state_dict(), path)


def initial_weights(path: Path) -> dict[str, Tensor]:
    """The same, mapped: what is not copied takes no memory."""
    weights: dict[str, Tensor] = torch.load(path, mmap=True)
    return weights


def build_gpt(workload: Workload, weights: Path) -> GPT:
    """The whole model in fp32 with the common weights."""
    with torch.device("meta"):
        model = GPT(workload)
    model.to_empty(device="cpu").load_state_dict(initial_weights(weights))
    return model


def micro_batches(batch: Batch, workload: Workload, rank: int = 0, size: int = 1) -> list[Batch]:
    """A data-parallel rank's share of a global batch."""
    pieces = zip(*(torch.split(part, workload.micro) for part in batch), strict=True)
    return list(pieces)[rank::size]


def decayed_apart(params: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not."""
    params = list(params)
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


ADAMW: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "fused": True}


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Mixed precision on fp32 weights; nothing for fp32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


def peak_rss_mb() -> float:
    """Peak resident memory of this process; getrusage would count its parent's before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def commit() -> str:
    """The state of the checkout that runs."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str | None]:
    """Packages that a benchmark may run, None where they are not installed."""
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "transformers", "deepspeed", "megatron-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def last_line(error: BaseException) -> str:
    """What an error says in the end, without torch's advice on how to say more."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and "TORCHDYNAMO_VERBOSE" not in line and "developer context" not in line]
    return f"{type(error).__name__}: {said[-1] if said else ''}"


def write_row(row: Mapping[str, Any], output: Path | None) -> None:
    """One JSON line on standard output, and at the end of a file."""
    text = json.dumps(row)
    print(text, flush=True)
    if output:
        with output.open("a") as file:
            file.write(text + "\n")


def sum_over_ranks(loss: Tensor) -> float:
    """Of each rank's share of the mean loss."""
    dist.all_reduce(loss)
    return loss.item()


class ClippedAdamW:
    """Clip by the global norm, then fused AdamW: on the parameters themselves, or on fp32 masters of bf16 ones.

    counted: which parameters this rank adds to the norm; the ranks' squares are summed unless `whole`, when every rank
    has all gradients.
    """

    def __init__(self, params: Mapping[str, Tensor], counted: Callable[[str], bool] = lambda _: True, *, whole: bool):
        self.params, self.whole = list(params.values()), whole
        self.counted = [index for index, name in enumerate(params) if counted(name)]
        half = self.params[0].dtype != torch.float32
        self.masters = [p.detach().float().requires_grad_() if half else p for p in self.params]
        self.half = half
        if half:
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        self.adamw = torch.optim.AdamW(decayed_apart(self.masters), **ADAMW)

    @torch.no_grad()
    def step(self) -> float:
        """Update, forget the gradients, and return their norm."""
        grads = [p.grad for p in self.masters if p.grad is not None]
        if self.half:
            torch._foreach_copy_(grads, [p.grad for p in self.params if p.grad is not None])
        norm = self._norm([grads[index] for index in self.counted])
        if norm > CLIP_GRAD:
            torch._foreach_mul_(grads, CLIP_GRAD / (norm + 1e-6))
        self.adamw.step()
        if self.half:
            torch._foreach_copy_(self.params, self.masters)
        torch._foreach_zero_([p.grad for p in self.params if p.grad is not None])
        return norm

    def _norm(self, grads: list[Tensor]) -> float:
        squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        if not self.whole:
            dist.all_reduce(squares)
        return math.sqrt(squares.item())
