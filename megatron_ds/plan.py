"""What a configuration implies on a given number of ranks: pure arithmetic, no device, no process group."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.config import Config
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.gpt import Stage
from megatron_ds.pipeline.schedule import Actions, build
from megatron_ds.rules import check_config
from megatron_ds.training.config import TrainingConfig


class SampleCounts(NamedTuple):
    """Samples that a run needs of each dataset."""

    train: int
    valid: int
    test: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layout, batch arithmetic, stages and schedule; everything that the flags leave to be worked out."""

    world_size: int
    sizes: dict[str, int]
    """Extent of every axis: pp, dp, cp, tp."""
    vocab: Vocab
    seq_length: int
    max_positions: int
    micro_batch_size: int
    global_batch_size: int
    num_microbatches: int
    train_iters: int
    samples: SampleCounts
    zero_stage: int
    stages: tuple[Stage, ...]
    actions: tuple[Actions, ...]
    eval_actions: tuple[Actions, ...]

    @property
    def tokens_per_batch(self) -> int:
        """Positions in one global batch."""
        return self.global_batch_size * self.seq_length


def make_plan(config: Config, world_size: int, vocab_size: int) -> Plan:
    """Work everything out.

    Raises: ConfigErrors with every broken rule
    """
    check_config(config, world_size)
    model, training = config.model, config.training
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    dp = world_size // (tp * pp)
    assert config.data.seq_length and training.micro_batch_size and model.num_layers
    global_batch = training.global_batch_size or training.micro_batch_size * dp
    num_microbatches = global_batch // (training.micro_batch_size * dp)
    train_iters = training.train_iters or (training.train_samples or 0) // global_batch
    evaluations = train_iters // training.eval_interval + 1
    return Plan(
        world_size=world_size,
        sizes={"pp": pp, "dp": dp, "cp": 1, "tp": tp},
        vocab=Vocab(vocab_size, pad_vocabulary(vocab_size, config.tokenizer.make_vocab_size_divisible_by * tp)),
        seq_length=config.data.seq_length,
        max_positions=model.max_position_embeddings or config.data.seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=global_batch,
        num_microbatches=num_microbatches,
        train_iters=train_iters,
        samples=SampleCounts(
            training.train_samples or train_iters * global_batch,
            evaluations * training.eval_iters * global_batch,
            training.eval_iters * global_batch,
        ),
        zero_stage=config.optimizer.effective_zero_stage,
        stages=cut_layers(model.num_layers, pp),
        actions=build(config.parallel.pipeline_schedule, pp, num_microbatches),
        eval_actions=build("forward", pp, num_microbatches),
    )


def continue_from(plan: Plan, training: TrainingConfig, iteration: int, consumed_samples: int) -> Plan:
    """The plan of a run that stands at `iteration`: a length in samples holds even if the batch has changed since."""
    if training.train_samples is None:
        return plan
    left = max(0, training.train_samples - consumed_samples) // plan.global_batch_size
    return dataclasses.replace(plan, train_iters=iteration + left)


def samples_from(plan: Plan, training: TrainingConfig, iteration: int, train: int, valid: int) -> SampleCounts:
    """What a run needs that stands at `iteration` and has consumed `train` and `valid` samples.

    Less than `plan.samples` never, or other datasets would be built; more if what was consumed was consumed with a
    larger batch or more validation than the flags ask for now.
    """
    train += max(0, plan.train_iters - iteration) * plan.global_batch_size
    evaluations = 1 + max(0, plan.train_iters // training.eval_interval - iteration // training.eval_interval)
    valid += evaluations * training.eval_iters * plan.global_batch_size
    needed = plan.samples
    return SampleCounts(max(train, needed.train), max(valid, needed.valid) if training.eval_iters else 0, needed.test)


def pad_vocabulary(size: int, multiple: int) -> int:
    """The smallest multiple that holds the vocabulary."""
    return -(-size // multiple) * multiple


def cut_layers(num_layers: int, num_stages: int) -> tuple[Stage, ...]:
    """Equal shares of the layers, in order."""
    share = num_layers // num_stages
    return tuple(
        Stage(i * share, (i + 1) * share, is_first=i == 0, is_last=i == num_stages - 1) for i in range(num_stages)
    )
