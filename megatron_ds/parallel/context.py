"""Who am I, whom do I talk to: the axes pp, dp, cp, tp of the mesh of ranks, tp fastest (Megatron's order)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_ds import log
from megatron_ds.parallel.config import ParallelConfig

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    `group` raises where there is none: to torch.distributed `group=None` silently means the whole world.
    """

    name: str
    size: int = 1
    rank: int = 0
    handle: Any = None

    @property
    def group(self) -> Any:
        """The process group of the ranks along this axis."""
        if self.handle is None:
            raise RuntimeError(f"axis {self.name} ({self.rank} of {self.size}) has no process group")
        return self.handle

    @property
    def is_first(self) -> bool:
        """True on the first rank of the axis."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """True on the last rank of the axis."""
        return self.rank == self.size - 1

    @classmethod
    def solo(cls, name: str) -> Axis:
        """An axis of one rank, on which every collective is the identity."""
        return cls(name)


@dataclass(frozen=True)
class ParallelContext:
    """All axes of this rank, the whole world, and the pair of stages that share a tied embedding."""

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    world: Axis
    embedding: Axis

    @classmethod
    def solo(cls) -> ParallelContext:
        """One process without a process group."""
        return cls(**{name: Axis.solo(name) for name in (*AXES, "world", "embedding")})


def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """Position of a global rank on every axis: pp slowest, tp fastest."""
    out = {}
    for name in reversed(AXES):
        rank, out[name] = divmod(rank, sizes[name])
    return {name: out[name] for name in AXES}


def start(config: ParallelConfig, sizes: dict[str, int], device: torch.device) -> ParallelContext:
    """Join the other ranks and build every axis.

    Comm: rendezvous of the whole world; one process group per axis longer than 1
    """
    world_size = log.world_size()
    if world_size == 1:
        return ParallelContext.solo()
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    dist.init_process_group(
        backend,
        store=_store(timeout),
        rank=log.rank(),
        world_size=world_size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )
    mesh = init_device_mesh(device.type, tuple(sizes[name] for name in AXES), mesh_dim_names=AXES)
    axes = {name: _axis(name, mesh.get_group(name)) if sizes[name] > 1 else Axis.solo(name) for name in AXES}
    for axis in axes.values():
        if axis.size > 1:  # DeviceMesh has no way to say it, and gloo's own is half an hour
            dist.distributed_c10d._set_pg_timeout(timeout, axis.group)
    return ParallelContext(
        **axes, world=_axis("world", dist.group.WORLD), embedding=_embedding_axis(mesh.mesh, axes["pp"], timeout)
    )


def stop() -> None:
    """Leave together, so that no rank tears its groups down while another still talks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _axis(name: str, group: Any) -> Axis:
    return Axis(name, dist.get_world_size(group), dist.get_rank(group), group)


def _embedding_axis(mesh: torch.Tensor, pp: Axis, timeout: timedelta) -> Axis:
    """First and last stage; a middle stage is alone on its embedding axis."""
    if pp.size == 1:
        return Axis.solo("embedding")
    ends = mesh[[0, -1]].reshape(2, -1).T.tolist()
    group, _ = dist.new_subgroups_by_enumeration(ends, timeout=timeout)
    return _axis("embedding", group) if pp.is_first or pp.is_last else Axis.solo("embedding")


def _store(timeout: timedelta) -> Any:
    """The rendezvous store, one name space per restart.

    torchrun's agent keeps one store over all restarts of a job; without a prefix a restarted rank reads the dead
    ranks' addresses (pytorch#135712). The count is the agent's own, so that several nodes cannot use it: there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every attempt a store of its own (scripts/slurm sets it).
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        world_size=log.world_size(),
        is_master=log.rank() == 0 and not agent_keeps_store,
        timeout=timeout,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_keeps_store and one_node else "0"
    return dist.PrefixStore(f"megatron_ds/{attempt}", store)  # type: ignore[attr-defined]
