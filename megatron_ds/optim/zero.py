"""One step of ZeRO-0, 1 or 2: norm -> clip -> AdamW on this rank's shard -> cast -> gather.

The optimizer sees *segments*: the part of one parameter that lies in this rank's shard of a bucket. ZeRO-0 is the case
in which every rank's shard is the whole bucket. Decay, norm and checkpoint all go by segment, so that nobody needs to
know where a shard was cut.

Source: Rajbhandari et al. 2020, arXiv:1910.02054; Loshchilov and Hutter 2019, arXiv:1711.05101
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ds.kernels import adamw as adamw_kernels
from megatron_ds.kernels.adamw import AdamW, Hyper, Part
from megatron_ds.optim.bucket import Bucket
from megatron_ds.optim.buckets import Buckets
from megatron_ds.optim.config import OptimizerConfig
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import ParamSpec, Piece


@dataclass
class Segment:
    """Elements [start, start + n) of one flattened local parameter, with their gradient and moments; all but the
    gradient (--grad-reduce-in-bf16) are fp32.

    Shapes: all tensors [n]
    """

    spec: ParamSpec
    start: int
    master: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    model: torch.Tensor | None
    """The same elements in the model's precision; None where they are the master itself."""

    @property
    def part(self) -> Part:
        """What the update works on."""
        return Part(self.master, self.grad, self.exp_avg, self.exp_avg_sq, self.model)


class ZeroOptimizer:
    """AdamW over the shards of one rank."""

    def __init__(
        self, buckets: Buckets, config: OptimizerConfig, *, tp: Axis, dp: Axis, adamw: AdamW = adamw_kernels.fused
    ):
        self.buckets, self.tp, self.dp = buckets, tp, dp
        self.gathers_late = config.overlap_param_gather and buckets.sharded
        self.device = next(iter(buckets)).params.device
        self.masters = {id(bucket): _master(bucket) for bucket in buckets}
        self.segments = [segment for bucket in buckets for segment in self._cut(bucket)]
        self.adamw, self.config = adamw, config
        self.steps = torch.zeros((), device=self.device)
        """Updates that made the moments (bias correction)."""

    def _cut(self, bucket: Bucket) -> Iterator[Segment]:
        master = self.masters[id(bucket)]
        for spec in bucket.specs:
            begin = bucket.offsets[spec.name]
            end = begin + torch.Size(spec.local_shape(self.tp.size)).numel()
            low, high = max(begin, bucket.start), min(end, bucket.stop)
            if low < high:
                mine = slice(low - bucket.start, high - bucket.start)
                values = master[mine].detach()
                grad, moments = bucket.shard_grads[mine], (torch.zeros_like(values), torch.zeros_like(values))
                model = None if self.model_is_master(bucket) else bucket.params[low:high]
                yield Segment(spec, low - begin, values, grad, *moments, model)

    def set_steps(self, steps: int) -> None:
        """Say how many updates made the moments."""
        self.steps.fill_(steps)

    def set_values(self, name: str, values: torch.Tensor) -> None:
        """Write one parameter's fp32 values into the model and the masters.

        Shapes: values = the local shape of the parameter
        """
        self.buckets.view(name, tuple(values.shape)).copy_(values)
        for segment in self.segments:
            if segment.spec.name == name:
                n = segment.master.numel()
                segment.master.copy_(values.reshape(-1)[segment.start : segment.start + n])

    @torch.no_grad()
    def masters_from_params(self) -> None:
        """Take the model's parameters as they are for the truth."""
        for bucket in self.buckets:
            self.masters[id(bucket)].copy_(bucket.params[bucket.start : bucket.stop])

    def squared_norm(self) -> torch.Tensor:
        """This rank's share of the squared gradient norm; over all ranks every element is counted once.

        Shapes: -> scalar, fp64
        """
        return self._squared_norm([segment.grad for segment in self._counted()])

    def params_squared_norm(self) -> torch.Tensor:
        """The same of the parameters.

        Shapes: -> scalar, fp64
        """
        return self._squared_norm([segment.master for segment in self._counted()])

    def num_zeros(self) -> torch.Tensor:
        """This rank's share of the gradient elements that are exactly zero.

        Shapes: -> scalar, fp64
        """
        zeros = [
            (piece.tensor == 0).sum()
            for segment in self._counted()  # by pieces, which leave out the padding of the vocabulary
            for piece in segment.spec.flat_pieces(segment.grad, segment.start, self.tp.rank, self.tp.size)
        ]
        return torch.stack(zeros).sum().double() if zeros else self._nothing()

    def _squared_norm(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if not tensors:
            return self._nothing()
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).double().square().sum()

    def _nothing(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _counted(self) -> list[Segment]:
        return [segment for segment in self.segments if self._counts(segment.spec)]

    def _counts(self, spec: ParamSpec) -> bool:
        replica = (spec.split is None and not self.tp.is_first) or spec.owned_by_first_stage
        return not replica and (self.buckets.sharded or self.dp.is_first)

    @torch.no_grad()
    def apply(self, *, lr: float, weight_decay: float, scale: torch.Tensor) -> None:
        """Multiply the gradients by `scale` (normalisation and clipping), update, and spread the new parameters.

        scale: on the device, which alone knows whether it is 0: then neither parameters, moments nor steps change.
        Shapes: scale [] fp32
        Comm:   ZeRO-1 and 2: all-gather of the parameters over dp and cp, changed or not
        """
        self.steps += scale != 0
        for decayed in (True, False):
            parts = [segment.part for segment in self.segments if segment.spec.decay is decayed]
            config = self.config
            decay = weight_decay if decayed else 0.0
            hyper = Hyper(lr, decay, config.adam_beta1, config.adam_beta2, config.adam_eps)
            self.adamw(parts, self.steps, scale, hyper)
        self._spread()

    @torch.no_grad()
    def publish(self) -> None:
        """Cast the masters to the model's precision and collect the other ranks' shards."""
        for bucket in self.buckets:
            if not self.model_is_master(bucket):
                bucket.params[bucket.start : bucket.stop].copy_(self.masters[id(bucket)])
        self._spread()

    def _spread(self) -> None:
        """Collect the other ranks' shards of the parameters."""
        self.buckets.gather_params()
        if not self.gathers_late:
            self.buckets.wait_params()

    def pieces(self) -> Iterator[Piece]:
        """Masters (where the model is not fp32 itself) and moments, for saving and loading."""
        for segment in self.segments:
            kinds = {"exp_avg": segment.exp_avg, "exp_avg_sq": segment.exp_avg_sq}
            if not self.model_is_master(self.buckets.of[segment.spec.name]):
                kinds["master"] = segment.master
            for kind, values in kinds.items():
                name = f"optimizer/{segment.spec.name}/{kind}"
                yield from segment.spec.flat_pieces(values, segment.start, self.tp.rank, self.tp.size, name)

    def model_is_master(self, bucket: Bucket) -> bool:
        """True where the parameters themselves are kept in fp32."""
        return bucket.params.dtype == torch.float32

    def saves(self, spec: ParamSpec) -> bool:
        """True on the one rank that writes a replicated optimizer state."""
        return self._counts(spec)


def _master(bucket: Bucket) -> torch.Tensor:
    """fp32 values of this rank's shard: the parameters themselves when they are fp32."""
    shard = bucket.params[bucket.start : bucket.stop]
    return shard if shard.dtype == torch.float32 else shard.float()
