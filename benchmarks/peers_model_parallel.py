"""Model-parallel peers: torch DTensor tensor parallelism (also with sequence parallelism), torch pipelining 1F1B.

What torch leaves to its user is written out here: a fused query-key-value matrix cut by heads, the tied head, norms and
positions under sequence parallelism, clipping by the norm of all ranks' gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from benchmarks.peer import Block
from benchmarks.peers_common import (
    GPT,
    ClippedAdamW,
    Precision,
    autocast,
    build_gpt,
    initial_weights,
    micro_batches,
    sum_over_ranks,
)
from benchmarks.workloads import Batch, Workload


class ShardedBlock(Block):
    """A block whose heads and features are cut over tp; with sequence parallelism x is cut along the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [b, s, h] -> [b, s, h]                 (sequence parallel: [b, s/t, h])"""
        qkv = self.qkv(self.ln_1(x))
        b, s, width = qkv.shape
        heads = self.heads // dist.get_world_size()
        q, k, v = (part.view(b, s, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, width // 3))
        out: Tensor = x + self.fc_2(F.gelu(self.fc_1(self.ln_2(x)), approximate="tanh"))
        return out


class ShardedGPT(GPT):
    """Embedding and head cut by vocabulary, blocks as above; the loss is made of the cut logits."""

    mesh: Any
    sequence_parallel: bool

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Shapes: [b, s], [b, s] -> []"""
        positions = self.positions.weight[: tokens.shape[1]]
        if self.sequence_parallel:
            positions = positions.chunk(dist.get_world_size())[dist.get_rank()]
        x = self.words(tokens) + positions
        for block in self.blocks:
            x = block(x)
        place = Shard(1) if self.sequence_parallel else Replicate()
        x = DTensor.from_local(self.ln_f(x), self.mesh, [place], run_check=False).redistribute(placements=[Replicate()])
        logits = F.linear(x, self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _by_heads(matrix: Tensor, ranks: int) -> Tensor:
    """Reorder the rows of a fused [q; k; v], so that a plain cut gives each rank its heads' share of all three."""
    return torch.cat([part for rank in range(ranks) for part in (p.chunk(ranks)[rank] for p in matrix.chunk(3))])


class TensorParallelStep:
    """torch DTensor: parallelize_module with a loss of cut logits."""

    def __init__(
        self,
        workload: Workload,
        dtype: torch.dtype,
        weights: Path,
        sequence_parallel: bool = False,
        bf16: Precision = "weights",
    ):
        dist.init_process_group("gloo")
        self.workload, self.size = workload, dist.get_world_size()
        self.dtype = dtype if bf16 == "autocast" else torch.float32
        self.mesh = init_device_mesh("cpu", (self.size,))
        model: Any = build_gpt(workload, weights)
        model.__class__, model.mesh, model.sequence_parallel = ShardedGPT, self.mesh, sequence_parallel
        for block in model.blocks:
            block.__class__ = ShardedBlock
            with torch.no_grad():
                block.qkv.weight.copy_(_by_heads(block.qkv.weight, self.size))
                block.qkv.bias.copy_(_by_heads(block.qkv.bias, self.size))
        self.model, self.sequence_parallel = model.to(dtype if bf16 == "weights" else torch.float32), sequence_parallel
        outside = Shard(1) if sequence_parallel else Replicate()
        column, row = ColwiseParallel(input_layouts=outside), RowwiseParallel(output_layouts=outside)
        inside = {"qkv": column, "fc_1": column, "proj": row, "fc_2": row}
        plan = {f"blocks.*.{name}": style for name, style in inside.items()}
        plan["words"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=outside)
        parallelize_module(model, self.mesh, plan)
        self.params: dict[str, Any] = dict(model.named_parameters())
        with torch.no_grad():  # the optimizer works on local tensors, which share their memory with the DTensors
            self.local = {
                name: nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p for name, p in self.params.items()
            }
        first = dist.get_rank() == 0
        self.update = ClippedAdamW(self.local, lambda name: first or self._is_cut(name), whole=False)

    def _is_cut(self, name: str) -> bool:
        p = self.params[name]
        return isinstance(p, DTensor) and p.placements[0].is_shard()

    def step(self, batch: Batch) -> float:
        """One optimizer step."""
        total, pieces = 0.0, micro_batches(batch, self.workload)
        for tokens, labels in pieces:
            with loss_parallel():
                with autocast(self.dtype):
                    loss = self.model(tokens, labels) / len(pieces)
                loss.backward()
            total += loss.to_local().item()
        self._local_grads()
        self.grad_norm = self.update.step()
        for name, p in self.params.items():
            if isinstance(p, DTensor) and not self._is_cut(name):
                p.grad = None
        return total

    @torch.no_grad()
    def _local_grads(self) -> None:
        """Give the optimizer's tensors their gradients, summed where ranks saw different positions."""
        plain = []
        for name, p in self.params.items():
            if isinstance(p, DTensor):
                grad: Any = p.grad
                self.local[name].grad = grad.redistribute(placements=p.placements).to_local()
            else:
                plain.append(p.grad)
        if self.sequence_parallel:
            flat = torch.cat([grad.flatten() for grad in plain])
            dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in plain])
            torch._foreach_copy_(plain, [part.view_as(grad) for part, grad in zip(parts, plain, strict=True)])


class StageModule(nn.Module):
    """An equal share of the blocks; the first stage embeds, the last one has norm and (tied) head."""

    def __init__(self, workload: Workload, stage: int, num_stages: int):
        super().__init__()
        self.first, self.last = stage == 0, stage == num_stages - 1
        share = workload.layers // num_stages
        self.blocks = nn.ModuleDict({str(i): Block(workload) for i in range(stage * share, (stage + 1) * share)})
        if self.first or self.last:
            self.words = nn.Embedding(workload.vocab, workload.hidden)
        if self.first:
            self.positions = nn.Embedding(workload.seq, workload.hidden)
        if self.last:
            self.ln_f = nn.LayerNorm(workload.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: tokens [b, s] or [b, s, h] -> [b, s, h] or logits [b, s, v]"""
        if self.first:
            x = self.words(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks.values():
            x = block(x)
        return F.linear(self.ln_f(x), self.words.weight) if self.last else x


class PipelineStep:
    """torch.distributed.pipelining, one stage per rank, 1F1B."""

    def __init__(self, workload: Workload, dtype: torch.dtype, weights: Path, bf16: Precision = "weights"):
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
        self.count = workload.micro_batches
        self.dtype = dtype if bf16 == "autocast" else torch.float32
        with torch.device("meta"):
            stage = StageModule(workload, rank, size)
        stage.to_empty(device="cpu").load_state_dict(initial_weights(weights), strict=False)
        self.stage = stage.to(dtype if bf16 == "weights" else torch.float32)
        self.schedule = Schedule1F1B(
            PipelineStage(stage, rank, size, torch.device("cpu")), self.count, loss_fn=self._loss, scale_grads=False
        )
        tied_copy = stage.last and not stage.first
        self.update = ClippedAdamW(
            dict(stage.named_parameters()), lambda name: not (tied_copy and name.startswith("words")), whole=False
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / self.count

    def step(self, batch: Batch) -> float:
        """One optimizer step."""
        tokens, labels = batch
        losses: list[Tensor] = []
        with autocast(self.dtype):
            if self.stage.first:
                self.schedule.step(tokens)
            else:
                self.schedule.step(target=labels, losses=losses)
        dist.all_reduce(self.stage.words.weight.grad)
        self.grad_norm = self.update.step()
        return sum_over_ranks(torch.stack(losses).sum().detach() if losses else torch.zeros(()))
