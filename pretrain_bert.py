"""Pretrain BERT: torchrun --nproc-per-node 2 pretrain_bert.py --tensor-model-parallel-size 2 ... (--help for all)."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ds import pretrain
from megatron_ds.data.batch import BERTBatch
from megatron_ds.data.datasets import Datasets, build_bert_datasets
from megatron_ds.model.bert import BertModel
from megatron_ds.plan import SampleCounts
from megatron_ds.training.run import Loss, Run, Stage

DEFAULTS = {"model_type": "BERT", "tokenizer_type": "BertWordPieceLowerCase"}


def model_provider(run: Run, stage: Stage) -> BertModel:
    """The part of the model that one pipeline stage, or one of its chunks, holds."""
    return BertModel(
        run.config.model,
        run.plan.vocab,
        stage,
        max_positions=run.plan.max_positions,
        runtime=run.runtime,
        **run.factory,
    )


def forward_step(batch: BERTBatch, model: torch.nn.Module, upstream: torch.Tensor | None) -> tuple[Any, Loss]:
    """Run one micro-batch; on the last stage losses are summed over masked tokens, and over samples."""
    output = model(
        batch.tokens,
        batch.token_types,
        batch.documents,
        upstream,
        batch.labels,
        batch.is_random,
        batch.position_ids,
    )

    def loss_func(output: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
        words, order = output
        sums = [(words * batch.loss_mask.t()).sum()]
        if order is None:
            return sums[0], batch.loss_mask.sum()
        return torch.stack((*sums, (order * batch.order_mask).sum())), batch.num_targets()

    return output, loss_func


def train_valid_test_datasets_provider(run: Run, num_samples: SampleCounts) -> Datasets:
    """The three datasets, each with at least as many samples as the run needs."""
    return build_bert_datasets(
        run.config.data,
        num_samples=num_samples,
        seq_length=run.plan.seq_length,
        seed=run.config.training.seed,
        vocab_size=run.plan.vocab.size,
        tokenizer=run.tokenizer,
        binary_head=run.config.model.bert_binary_head,
    )


if __name__ == "__main__":
    pretrain(train_valid_test_datasets_provider, model_provider, forward_step, args_defaults=DEFAULTS)
