"""Pretrain GPT: torchrun --nproc-per-node 2 pretrain_gpt.py --tensor-model-parallel-size 2 ... (--help for all)."""

from __future__ import annotations

import torch

from megatron_ds import pretrain
from megatron_ds.data.batch import GPTBatch
from megatron_ds.data.datasets import Datasets, build_gpt_datasets
from megatron_ds.model.gpt import GPTModel
from megatron_ds.plan import SampleCounts
from megatron_ds.training.run import Loss, Run, Stage


def model_provider(run: Run, stage: Stage) -> GPTModel:
    """The part of the model that one pipeline stage, or one of its chunks, holds."""
    return GPTModel(
        run.config.model,
        run.plan.vocab,
        stage,
        max_positions=run.plan.max_positions,
        runtime=run.runtime,
        **run.factory,
    )


def forward_step(batch: GPTBatch, model: torch.nn.Module, upstream: torch.Tensor | None) -> tuple[torch.Tensor, Loss]:
    """Run one micro-batch; on the last stage the loss is summed over target tokens."""
    losses = model(batch.tokens, batch.position_ids, upstream, batch.labels, batch.documents)

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = batch.loss_mask.t()
        return (losses * mask).sum(), mask.sum()

    return losses, loss_func


def train_valid_test_datasets_provider(run: Run, num_samples: SampleCounts) -> Datasets:
    """The three datasets, each with at least as many samples as the run needs."""
    return build_gpt_datasets(
        run.config.data,
        num_samples=num_samples,
        seq_length=run.plan.seq_length,
        seed=run.config.training.seed,
        vocab_size=run.plan.vocab.size,
        tokenizer_fingerprint=run.tokenizer.fingerprint() if run.tokenizer else None,
    )


if __name__ == "__main__":
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
    )
