"""The package's own training step, built from a command line like any other and fed with a benchmark's batches."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import BETAS, CLIP_GRAD, EPS, LEARNING_RATE, WEIGHT_DECAY, Batch, Workload
from megatron_ds.config import parse
from megatron_ds.data.batch import BERTBatch, GPTBatch, T5Batch
from megatron_ds.optim.lr import lr_schedule
from megatron_ds.parallel import context, launch
from megatron_ds.parallel.context import ParallelContext
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.plan import make_plan
from megatron_ds.timers import Timers
from megatron_ds.training import cpu
from megatron_ds.training.dry_run import stage_costs
from megatron_ds.training.engine import build_engine
from megatron_ds.training.flops import train_flops_per_sample
from megatron_ds.training.progress import Progress
from megatron_ds.training.run import Recipe, Run, chosen_kernels
from megatron_ds.training.step import train_step

RECIPES = {"gpt": "pretrain_gpt", "llama": "pretrain_gpt", "bert": "pretrain_bert", "t5": "pretrain_t5"}

ARCHITECTURE = {
    "gpt": "",
    "bert": "--apply-residual-connection-post-layernorm --no-bias-gelu-fusion --norm-epsilon 1e-12",
    "t5": "--position-embedding-type relative --softmax-scale 1.0 --normalization RMSNorm --norm-epsilon 1e-6 --relu "
    "--disable-bias-linear --no-lm-head-bias --scale-decoder-outputs",
    "llama": "--position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-6 --swiglu "
    "--disable-bias-linear",
}


def arguments(w: Workload, dtype: str, device: str) -> list[str]:
    """The command line of a workload."""
    flags = f"""--num-layers {w.layers} --hidden-size {w.hidden} --num-attention-heads {w.heads} --seq-length {w.seq}
        --micro-batch-size {w.micro} --global-batch-size {w.global_} --train-iters 1000 --lr {LEARNING_RATE}
        --lr-decay-style constant --weight-decay {WEIGHT_DECAY} --adam-beta1 {BETAS[0]} --adam-beta2 {BETAS[1]}
        --adam-eps {EPS} --clip-grad {CLIP_GRAD} --hidden-dropout 0 --attention-dropout 0 --mock-data
        --device {device} {"--bf16" if dtype == "bf16" else ""} {ARCHITECTURE[w.model]}"""
    if w.model == "t5":
        flags += f" --decoder-seq-length {w.decoder_seq}"
    if w.kv_heads:
        flags += f" --group-query-attention --num-query-groups {w.kv_heads}"
    if w.ffn:
        flags += f" --ffn-hidden-size {w.ffn}"
    return flags.split()


def peer_name(name: str) -> str:
    """`layers.3.mlp.linear_fc1.bias` is `blocks.3.fc_1.bias` in the plain GPT."""
    modules = {
        "input_layernorm": "ln_1", "self_attention.linear_qkv": "qkv", "self_attention.linear_proj": "proj",
        "pre_mlp_layernorm": "ln_2", "mlp.linear_fc1": "fc_1", "mlp.linear_fc2": "fc_2", "final_layernorm": "ln_f",
        "embedding.word_embeddings": "words", "embedding.position_embeddings": "positions",
    }  # fmt: skip
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{modules[module]}.{leaf}"
    _, number, inner = module.split(".", 2)
    return f"blocks.{number}.{modules[inner]}.{leaf}"


class OurStep:
    """One rank's training; `flags` are added to the command line, `weights` a file of benchmarks/peers_common.py."""

    def __init__(
        self,
        workload: Workload,
        dtype: str,
        device: str,
        weights: Path | None = None,
        flags: str = "",
        processes: int = 1,
    ):
        script = importlib.import_module(RECIPES[workload.model])
        launch.adopt_environment()
        if device == "cpu":
            cpu.prepare(torch.get_num_threads())  # as pretrain() does
        self.workload, self.device = workload, torch.device(device)
        config = parse(arguments(workload, dtype, device) + flags.split(), getattr(script, "DEFAULTS", None))
        plan = make_plan(config, processes, workload.vocab)
        alone = processes == 1
        self.parallel = ParallelContext.solo() if alone else context.start(config.parallel, plan.sizes, self.device)
        streams = DropoutStreams(0, 0, self.device.type)
        kernels = chosen_kernels(config, self.device).kernels
        self.run = Run(config, plan, self.parallel, kernels, self.device, None, streams)
        self.recipe = Recipe(script.train_valid_test_datasets_provider, script.model_provider, script.forward_step)
        self.engine = build_engine(self.run, self.recipe)
        self.engine.train(True)
        if weights is None:
            self._draw()
        else:
            self.load(torch.load(weights, mmap=True))
        self.flops_per_token = train_flops_per_sample(self.run, self.recipe) // workload.tokens_per_sample
        self.parameters = sum(torch.Size(spec.shape).numel() for spec in self.engine.table.values())
        self.schedule = lr_schedule(config.lr, config.optimizer, None, plan.global_batch_size, 1000)
        self.progress = Progress(loss_scale=self.engine.loss_scaling.start())

    def _draw(self) -> None:
        """The package's own distributions, drawn where the model is: for models that take minutes on a CPU."""
        torch.manual_seed(0)
        for name, spec in self.engine.table.items():
            values = torch.full(spec.local_shape(self.parallel.tp.size), float(spec.init.kind == "ones"))
            values = values.to(self.device)
            self._set(name, values.normal_(0.0, spec.init.std) if spec.init.kind == "normal" else values)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Everyone's initial weights, each cut as its row of the parameter table says."""
        tp = self.parallel.tp
        for name, spec in self.engine.table.items():
            found = weights[peer_name(name) if self.workload.model == "gpt" else name]
            values = found.new_zeros(spec.local_shape(tp.size))
            for region in spec.regions(tp.rank, tp.size):
                values[region.local.slices()] = found[region.globe.slices()]
            self._set(name, values.to(self.device))

    @torch.no_grad()
    def _set(self, name: str, values: torch.Tensor) -> None:
        self.engine.optimizer.set_values(name, values)

    def step(self, batch: Batch) -> float:
        """One step on a global batch; returns the sum of its losses."""
        dp, w = self.parallel.dp, self.workload
        pieces = list(zip(*(part.to(self.device).split(w.micro) for part in batch), strict=True))
        batches = (_batch(w, parts) for parts in pieces[dp.rank :: dp.size])
        result = train_step(self.engine, self.schedule, self.progress, batches, Timers(), stop=False, out_of_time=False)
        self.progress = self.progress.after_step(len(batch[0]), result.skipped, result.next_loss_scale)
        self.grad_norm = result.grad_norm
        return sum(result.losses.values())

    def planned_bytes(self) -> int:
        """What --dry-run says that a rank of the first stage needs at the fullest moment of a step."""
        return stage_costs(self.run, self.recipe)[0].total_bytes


def _batch(w: Workload, parts: Sequence[torch.Tensor]) -> Any:
    """One micro-batch as the package's loader would make it."""
    tokens = parts[0]
    positions = torch.arange(w.seq, device=tokens.device).expand_as(tokens)
    if w.model == "bert":
        return BERTBatch(*parts, positions, torch.ones(len(tokens), device=tokens.device))  # type: ignore[call-arg]
    ones = torch.ones(parts[1].shape, device=tokens.device)
    if w.model == "t5":
        return T5Batch(*parts[:3], ones, parts[3])  # type: ignore[call-arg]
    return GPTBatch(*parts, ones, positions)  # type: ignore[call-arg]
