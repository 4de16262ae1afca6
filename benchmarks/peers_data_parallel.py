"""Data-parallel peers on one plain-torch model: DDP, DDP + ZeroRedundancyOptimizer (ZeRO-1), FSDP2, DeepSpeed ZeRO."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from benchmarks.peers_common import (
    ADAMW,
    ClippedAdamW,
    Precision,
    autocast,
    build_gpt,
    decayed_apart,
    micro_batches,
    sum_over_ranks,
)
from benchmarks.workloads import CLIP_GRAD, Batch, Workload


class DDPStep:
    """torch DDP; each bucket is reduced in the last micro-batch's backward.

    bf16: autocast on fp32 weights, or bf16 weights (and gradients) with fp32 masters.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, weights: Path, bf16: Precision = "autocast"):
        dist.init_process_group("gloo")
        self.workload, self.rank, self.size = workload, dist.get_rank(), dist.get_world_size()
        half_weights = dtype == torch.bfloat16 and bf16 == "weights"
        self.dtype = torch.float32 if half_weights else dtype
        model = build_gpt(workload, weights).to(dtype if half_weights else torch.float32)
        self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.update = self.make_update()

    def make_update(self) -> Any:
        """The optimizer."""
        return ClippedAdamW(dict(self.ddp.module.named_parameters()), whole=True)

    def step(self, batch: Batch) -> float:
        """One optimizer step."""
        mine = micro_batches(batch, self.workload, self.rank, self.size)
        total = torch.zeros(())
        for number, (tokens, labels) in enumerate(mine, 1):
            with self.ddp.no_sync() if number < len(mine) else contextlib.nullcontext():
                with autocast(self.dtype):
                    loss = self.ddp(tokens, labels) / len(mine)
                loss.backward()
            total += loss.detach()
        self.grad_norm = self.update.step()
        return sum_over_ranks(total / self.size)


class _ClippedZeRO:
    """ZeroRedundancyOptimizer behind a clip; every rank has all gradients."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.optimizer = ZeroRedundancyOptimizer(
            decayed_apart(model.parameters()),
            optimizer_class=torch.optim.AdamW,
            parameters_as_bucket_view=True,
            **ADAMW,
        )

    def step(self) -> float:
        norm = clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return norm.item()


class ZeroRedundancyStep(DDPStep):
    """torch DDP with the optimizer state in shares: ZeRO-1."""

    def make_update(self) -> Any:
        """The optimizer."""
        return _ClippedZeRO(self.ddp.module)


class FSDP2Step:
    """torch fully_shard, parameters kept after the forward; bf16 compute and fp32 reduction by its own policy."""

    def __init__(self, workload: Workload, dtype: torch.dtype, weights: Path):
        dist.init_process_group("gloo")
        self.workload, self.rank, self.size = workload, dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh("cpu", (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        self.model: Any = build_gpt(workload, weights)
        for module in (*self.model.blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.optimizer = torch.optim.AdamW(decayed_apart(self.model.parameters()), **ADAMW)

    def step(self, batch: Batch) -> float:
        """One optimizer step."""
        mine = micro_batches(batch, self.workload, self.rank, self.size)
        total = torch.zeros(())
        for number, (tokens, labels) in enumerate(mine, 1):
            self.model.set_requires_gradient_sync(number == len(mine))
            loss = self.model(tokens, labels) / len(mine)
            loss.backward()
            total += loss.detach()
        norm: Any = clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self.grad_norm = norm.full_tensor().item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum_over_ranks(total / self.size)


class DeepSpeedStep:
    """DeepSpeed ZeRO-1 or ZeRO-2 with fused AdamW; bf16 by DeepSpeed's own engine (bf16 weights, fp32 masters)."""

    def __init__(self, workload: Workload, dtype: torch.dtype, weights: Path, stage: int):
        import deepspeed  # type: ignore[import-not-found]

        deepspeed.init_distributed("gloo", verbose=False)
        self.workload, self.rank, self.size = workload, dist.get_rank(), dist.get_world_size()
        model = build_gpt(workload, weights)
        settings = {
            "train_batch_size": workload.global_,
            "train_micro_batch_size_per_gpu": workload.micro,
            "gradient_clipping": CLIP_GRAD,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": True},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        optimizer = torch.optim.AdamW(decayed_apart(model.parameters()), **ADAMW)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(self, batch: Batch) -> float:
        """One optimizer step."""
        mine = micro_batches(batch, self.workload, self.rank, self.size)
        total = torch.zeros(())
        for tokens, labels in mine:
            loss = self.engine(tokens, labels)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / len(mine)
        self.grad_norm = float(self.engine.get_global_grad_norm())
        return sum_over_ranks(total / self.size)
