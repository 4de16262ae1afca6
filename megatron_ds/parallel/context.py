"""Who am I, whom do I talk to: the axes pp, dp, cp, tp of the mesh of ranks, tp fastest (Megatron's order)."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_ds import log
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.parallel.shared_memory import SharedMemory
from megatron_ds.parallel.traffic import Traffic

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    `group` raises where there is none: to torch.distributed `group=None` silently means the whole world.
    on_paper: there are no other ranks; collectives only count what they would send (--dry-run).
    """

    name: str
    size: int = 1
    rank: int = 0
    handle: Any = None
    on_gloo: bool = False
    on_paper: bool = False
    memory: SharedMemory = field(default_factory=SharedMemory, compare=False, repr=False)
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

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
    """All axes of this rank, and three more that combine them.

    dp_cp: the ranks that hold the same parameters; over it gradients are summed and ZeRO shards are cut.
    embedding: the first and the last stage, which share a tied embedding.
    """

    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    dp_cp: Axis
    embedding: Axis
    world: Axis

    @property
    def axes(self) -> list[Axis]:
        """Every axis once."""
        return [getattr(self, axis.name) for axis in dataclasses.fields(self)]

    @classmethod
    def solo(cls) -> ParallelContext:
        """One process without a process group."""
        return cls(**{axis.name: Axis.solo(axis.name) for axis in dataclasses.fields(cls)})

    @classmethod
    def on_paper(cls, sizes: dict[str, int], rank: int = 0) -> ParallelContext:
        """The axes of any rank of any world, with nobody at the other ends."""
        at = coordinates(rank, sizes)
        axes = {name: Axis(name, sizes[name], at[name], on_paper=True) for name in AXES}
        data, ends = sizes["dp"] * sizes["cp"], sizes["pp"] > 1 and at["pp"] in (0, sizes["pp"] - 1)
        return cls(
            **axes,
            dp_cp=Axis("dp_cp", data, at["dp"] * sizes["cp"] + at["cp"], on_paper=True),
            embedding=Axis("embedding", 2, int(at["pp"] > 0), on_paper=True) if ends else Axis.solo("embedding"),
            world=Axis("world", math.prod(sizes.values()), rank, on_paper=True),
        )


@dataclass(frozen=True)
class Sharding:
    """How the tensors inside a layer are shared between ranks.

    tp cuts heads, features and vocabulary; with sequence_parallel what lies between those regions is cut over tp along
    the sequence. cp cuts the sequence everywhere: attention sees the rest by a ring of keys and values, in which each
    rank has a head and a tail chunk, or, with ulysses, by exchanging sequence for heads.
    """

    tp: Axis
    cp: Axis = field(default_factory=lambda: Axis.solo("cp"))
    sequence_parallel: bool = False
    ulysses: bool = False

    @classmethod
    def solo(cls) -> Sharding:
        """Nothing is shared."""
        return cls(Axis.solo("tp"))

    @property
    def partial_over(self) -> tuple[str, ...]:
        """Axes over which the gradient of a replicated parameter is only a partial sum (besides dp and cp)."""
        return ("tp",) if self.sequence_parallel else ()

    @property
    def sequence_shard(self) -> int:
        """Which part of a sequence this rank has between the regions of tensor parallelism."""
        return self.cp.rank * self.tp.size + self.tp.rank if self.sequence_parallel else self.cp.rank


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
    if log.world_size() == 1:
        return ParallelContext.solo()
    join(config, device)
    return build_axes(config, sizes, device)


def join(config: ParallelConfig, device: torch.device) -> None:
    """Meet the other ranks.

    Comm: rendezvous of the whole world
    """
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    dist.init_process_group(
        backend,
        store=_store(timeout),
        rank=log.rank(),
        world_size=log.world_size(),
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )


def build_axes(config: ParallelConfig, sizes: dict[str, int], device: torch.device) -> ParallelContext:
    """The axes of one layout of the ranks that have met; another layout of the same ranks may follow.

    Comm: one process group per axis longer than 1
    """
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    mesh = init_device_mesh(device.type, tuple(sizes[name] for name in AXES), mesh_dim_names=AXES)
    axes = {name: _axis(name, mesh.get_group(name), timeout) if sizes[name] > 1 else Axis.solo(name) for name in AXES}
    for axis in axes.values():
        if axis.size > 1:  # DeviceMesh has no way to say it, and gloo's own is half an hour
            dist.distributed_c10d._set_pg_timeout(timeout, axis.group)
    return ParallelContext(
        **axes,
        dp_cp=_data_axis(mesh.mesh, axes["dp"], axes["cp"], timeout),
        embedding=_embedding_axis(mesh.mesh, axes["pp"], timeout),
        world=_axis("world", dist.group.WORLD, timeout),
    )


def stop() -> None:
    """Leave together, so that no rank tears its groups down while another still talks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _axis(name: str, group: Any, timeout: timedelta) -> Axis:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    memory = SharedMemory(timeout.total_seconds())
    return Axis(name, size, rank, group, on_gloo=dist.get_backend(group) == "gloo", memory=memory)


def _data_axis(mesh: torch.Tensor, dp: Axis, cp: Axis, timeout: timedelta) -> Axis:
    """dp and cp as one axis; where one of them has size 1, the other one's group serves."""
    if dp.size == 1 or cp.size == 1:
        longer = dp if cp.size == 1 else cp
        return dataclasses.replace(longer, name="dp_cp", traffic=Traffic())
    rows = mesh.permute(0, 3, 1, 2).reshape(-1, dp.size * cp.size).tolist()
    group, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
    return _axis("dp_cp", group, timeout)


def _embedding_axis(mesh: torch.Tensor, pp: Axis, timeout: timedelta) -> Axis:
    """First and last stage; a middle stage is alone on its embedding axis."""
    if pp.size == 1:
        return Axis.solo("embedding")
    ends = mesh[[0, -1]].reshape(2, -1).T.tolist()
    group, _ = dist.new_subgroups_by_enumeration(ends, timeout=timeout)
    return _axis("embedding", group, timeout) if pp.is_first or pp.is_last else Axis.solo("embedding")


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
