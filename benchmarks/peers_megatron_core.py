"""Megatron-Core's GPTModel on two CPU processes, tensor or pipeline parallel. As shipped it asks for CUDA everywhere.

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 && VENV/bin/pip install -e .
    VENV/bin/pip install --no-deps megatron-core==0.16.1
    VENV/bin/python benchmarks/parallel.py --only tp,pp

Its local layer specification, bf16 weights and gradients, its own schedules; the masters, clipping and AdamW around it
are those of the other peers, for its optimizer wants a GPU too. `run_on_cpu` is all that is changed in it: where a
device is asked for it gets the CPU, and streams of random numbers, of which nothing is drawn here, are left alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers_common import ClippedAdamW, initial_weights, micro_batches, sum_over_ranks
from benchmarks.workloads import Batch, Workload


class _TorchOnCPU:
    """torch, but zeros that are wanted on a GPU are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> Tensor:
        """torch.zeros."""
        return torch.zeros(*size, **options)


def run_on_cpu() -> None:
    """Let Megatron-Core run where there is no GPU."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment,method-assign]
    schedules.torch = _TorchOnCPU()
    random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()


class MegatronCoreStep:
    """One optimizer step; `tp` and `pp` are the extents of the layout."""

    def __init__(self, workload: Workload, dtype: torch.dtype, weights: Path, tp: int = 1, pp: int = 1):
        warnings.filterwarnings("ignore", module="megatron")
        dist.init_process_group("gloo")
        run_on_cpu()
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        parallel_state.initialize_model_parallel(tp, pp)
        self.workload, self.pp, self.last = workload, pp, parallel_state.is_pipeline_last_stage()
        self.model = _build(workload, dtype, tp, pp)
        self._load(initial_weights(weights), parallel_state.get_tensor_model_parallel_rank(), tp)
        self.run = get_forward_backward_func()
        self.hidden = torch.ones(1, 1, workload.seq, workload.seq).triu(1).bool()
        self.positions = torch.arange(workload.seq).expand(workload.micro, -1)
        params, first = dict(self.model.named_parameters()), dist.get_rank() == 0
        cut = {name for name, p in params.items() if getattr(p, "tensor_model_parallel", False)}
        tied_copy = "output_layer.weight"
        self.update = ClippedAdamW(
            params, lambda name: name != tied_copy and (pp > 1 or first or name in cut), whole=False
        )

    def _load(self, weights: dict[str, Tensor], rank: int, tp: int) -> None:
        """Its parameters under the peers' names, cut over tp; rows of queries, keys and values lie head by head."""
        modules = {
            "input_layernorm": "ln_1", "self_attention.linear_qkv": "qkv", "self_attention.linear_proj": "proj",
            "pre_mlp_layernorm": "ln_2", "mlp.linear_fc1": "fc_1", "mlp.linear_fc2": "fc_2",
            "decoder.final_layernorm": "ln_f", "output_layer": "words",
            "embedding.word_embeddings": "words", "embedding.position_embeddings": "positions",
        }  # fmt: skip
        for name, parameter in self.model.named_parameters():
            module, _, leaf = name.rpartition(".")
            block = ""
            if module.startswith("decoder.layers."):
                _, _, local, module = module.split(".", 3)
                block = f"blocks.{self.model.decoder.layers[int(local)].layer_number - 1}."
            value = weights[f"{block}{modules[module]}.{leaf}"]
            if module.endswith("linear_qkv"):
                heads = value.unflatten(0, (3, self.workload.heads, -1))
                value = heads.transpose(0, 1).flatten(0, 2)
            if getattr(parameter, "tensor_model_parallel", False):
                value = value.chunk(tp, dim=parameter.partition_dim)[rank]
            parameter.data.copy_(value)

    def _forward(self, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        tokens, labels = next(batches)
        losses = model(tokens, self.positions, self.hidden, labels=labels)

        def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
            loss = losses.float().mean()
            return loss, loss.detach().clone()

        return losses, mean

    def step(self, batch: Batch) -> float:
        """One optimizer step."""
        pieces = micro_batches(batch, self.workload)
        losses = self.run(
            forward_step_func=self._forward,
            data_iterator=iter(pieces),
            model=self.model,
            num_microbatches=len(pieces),
            seq_length=self.workload.seq,
            micro_batch_size=self.workload.micro,
        )
        if self.pp > 1:
            dist.all_reduce(self.model.shared_embedding_or_output_weight().grad)
        self.grad_norm = self.update.step()
        mean = torch.stack(losses).mean() if losses else torch.zeros(())
        return sum_over_ranks(mean) if self.pp > 1 else mean.item()


def _build(w: Workload, dtype: torch.dtype, tp: int, pp: int) -> Any:
    """The model; its fused GELU is the tanh form, compiled by torch as Megatron-Core does."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=w.layers,
        hidden_size=w.hidden,
        num_attention_heads=w.heads,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        use_cpu_initialization=True,
        deallocate_pipeline_outputs=True,
    )
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        w.vocab,
        w.seq,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    )
    return model.to(dtype)
