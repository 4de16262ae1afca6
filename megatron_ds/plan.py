"""What a configuration implies on a given number of ranks: pure arithmetic, no device, no process group."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.batch import BatchSchedule, batch_schedule
from megatron_ds.config import Config
from megatron_ds.model.chunk import Lengths, Stage
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.pipeline.schedule import Actions, ScheduleName, build
from megatron_ds.rules import check_config
from megatron_ds.rules_layout import ranks_per_replica
from megatron_ds.stages import cut_layers, cut_two_stacks, parameter_weights
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
    lengths: Lengths
    max_positions: int
    micro_batch_size: int
    global_batch_size: int
    """The full one, to which a growing batch comes in the end."""
    batches: BatchSchedule
    train_iters: int
    samples: SampleCounts
    zero_stage: int
    schedule: ScheduleName
    stages: tuple[tuple[Stage, ...], ...]
    """Of each pipeline rank its chunks; virtual stage chunk * pp + stage."""

    @property
    def seq_length(self) -> int:
        """Positions of a sample; of T5's the encoder's."""
        return self.lengths.tokens

    @property
    def num_chunks(self) -> int:
        """Virtual stages of each pipeline rank."""
        return len(self.stages[0])

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of each data-parallel rank in the full batch."""
        return self._microbatches(self.global_batch_size)

    @property
    def tokens_per_batch(self) -> int:
        """Positions in one full global batch."""
        return self.global_batch_size * self.seq_length

    @property
    def eval_actions(self) -> tuple[Actions, ...]:
        """What each stage does in an evaluation of one full batch."""
        return build("forward", self.sizes["pp"], self.num_chunks, self.num_microbatches)

    def global_batch_at(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        return self.batches.batch_at(consumed_samples)

    def num_microbatches_at(self, consumed_samples: int) -> int:
        """Micro-batches of each data-parallel rank in that step."""
        return self._microbatches(self.global_batch_at(consumed_samples))

    def actions(self, num_microbatches: int) -> tuple[Actions, ...]:
        """What each stage does in a step of so many micro-batches; ZeRO-2 reduces the gradients of each by itself."""
        return build(self.schedule, self.sizes["pp"], self.num_chunks, num_microbatches, self.zero_stage == 2)

    def _microbatches(self, global_batch: int) -> int:
        return global_batch // (self.micro_batch_size * self.sizes["dp"])


def make_plan(config: Config, world_size: int, vocab_size: int) -> Plan:
    """Work everything out.

    Raises: ConfigErrors with every broken rule
    """
    check_config(config, world_size)
    parallel, training, seq_length = config.parallel, config.training, config.data.seq_length
    assert seq_length and training.micro_batch_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = world_size // ranks_per_replica(parallel)
    batches = batch_schedule(training, seq_length, training.micro_batch_size * dp)
    train_iters = training.train_iters or batches.iterations(training.train_samples or 0)
    evaluations = train_iters // training.eval_interval + 1
    vocab = Vocab(vocab_size, pad_vocabulary(vocab_size, config.tokenizer.make_vocab_size_divisible_by * tp))
    lengths = Lengths(seq_length, config.data.decoder_seq_length or 0)
    max_positions = config.model.max_position_embeddings or max(lengths)
    chunks = parallel.virtual_stages(config.model.total_layers)
    return Plan(
        world_size=world_size,
        sizes={"pp": pp, "dp": dp, "cp": parallel.context_size, "tp": tp},
        vocab=vocab,
        lengths=lengths,
        max_positions=max_positions,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=batches.final,
        batches=batches,
        train_iters=train_iters,
        samples=SampleCounts(
            training.train_samples or batches.consumed_after(train_iters),
            evaluations * training.eval_iters * batches.final,
            training.eval_iters * batches.final,
        ),
        zero_stage=config.optimizer.effective_zero_stage,
        # With one virtual stage on every rank the interleaved order is 1F1B's.
        schedule="1f1b" if chunks == 1 and parallel.schedule_name == "interleaved" else parallel.schedule_name,
        stages=stages_of(config.model, parallel, lengths, vocab, max_positions),
    )


def stages_of(
    model: TransformerConfig, parallel: ParallelConfig, lengths: Lengths, vocab: Vocab, max_positions: int
) -> tuple[tuple[Stage, ...], ...]:
    """Of each pipeline rank its chunks."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_stages(model.total_layers)
    if model.model_type == "T5":
        return cut_two_stacks(
            model,
            lengths,
            stages,
            chunks,
            split=parallel.pipeline_model_parallel_split_rank,
            of_chunk=parallel.num_layers_per_virtual_pipeline_stage,
        )
    return cut_layers(
        model.total_layers,
        stages,
        chunks,
        first=parallel.decoder_first_pipeline_num_layers,
        last=parallel.decoder_last_pipeline_num_layers,
        method=parallel.pp_partition_method,
        parameters=parameter_weights(model, vocab.padded, max_positions),
    )


def continue_from(plan: Plan, training: TrainingConfig, iteration: int, consumed_samples: int) -> Plan:
    """The plan of a run that stands at `iteration`: a length in samples holds even if the batch has changed since."""
    if training.train_samples is None:
        return plan
    left = plan.batches.iterations(training.train_samples, consumed_samples)
    return dataclasses.replace(plan, train_iters=iteration + left)


def samples_from(plan: Plan, training: TrainingConfig, iteration: int, train: int, valid: int) -> SampleCounts:
    """What a run needs that stands at `iteration` and has consumed `train` and `valid` samples.

    Less than `plan.samples` never, or other datasets would be built; more if what was consumed was consumed with a
    larger batch or more validation than the flags ask for now.
    """
    train = plan.batches.consumed_after(max(0, plan.train_iters - iteration), train)
    evaluations = 1 + max(0, plan.train_iters // training.eval_interval - iteration // training.eval_interval)
    valid += evaluations * training.eval_iters * plan.global_batch_size
    needed = plan.samples
    return SampleCounts(max(train, needed.train), max(valid, needed.valid) if training.eval_iters else 0, needed.test)


def pad_vocabulary(size: int, multiple: int) -> int:
    """The smallest multiple that holds the vocabulary."""
    return -(-size // multiple) * multiple
