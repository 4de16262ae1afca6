"""Pretrain T5: torchrun --nproc-per-node 2 pretrain_t5.py --tensor-model-parallel-size 2 ... (--help for all)."""

from __future__ import annotations

import torch

from megatron_ds import pretrain
from megatron_ds.data.batch import T5Batch
from megatron_ds.data.datasets import Datasets, build_t5_datasets
from megatron_ds.model.t5 import T5Model
from megatron_ds.plan import SampleCounts
from megatron_ds.training.run import Loss, Run, Stage

DEFAULTS = {"model_type": "T5", "tokenizer_type": "BertWordPieceLowerCase"}


def model_provider(run: Run, stage: Stage) -> T5Model:
    """The part of the model that one pipeline stage, or one of its chunks, holds."""
    return T5Model(
        run.config.model,
        run.plan.vocab,
        stage,
        max_positions=run.plan.max_positions,
        runtime=run.runtime,
        **run.factory,
    )


def forward_step(batch: T5Batch, model: torch.nn.Module, upstream: torch.Tensor | None) -> tuple[torch.Tensor, Loss]:
    """Run one micro-batch; on the last stage the loss is summed over the decoder's target tokens."""
    losses = model(batch.encoder_tokens, batch.decoder_tokens, batch.encoder_documents, upstream, batch.labels)

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = batch.loss_mask.t()
        return (losses * mask).sum(), mask.sum()

    return losses, loss_func


def train_valid_test_datasets_provider(run: Run, num_samples: SampleCounts) -> Datasets:
    """The three datasets, each with at least as many samples as the run needs."""
    return build_t5_datasets(
        run.config.data,
        num_samples=num_samples,
        seq_length=run.plan.seq_length,
        decoder_seq_length=run.plan.lengths.decoder,
        seed=run.config.training.seed,
        vocab_size=run.plan.vocab.size,
        tokenizer=run.tokenizer,
    )


if __name__ == "__main__":
    pretrain(train_valid_test_datasets_provider, model_provider, forward_step, args_defaults=DEFAULTS)
