"""A trained model without its training: the chunk of this rank on any layout, read from a checkpoint of any other.

trained = open_checkpoint(options)                     alone, or one rank of many under torchrun
run(trained, [batch, ...], collect)                    the last stage hands its output of each batch to `collect`
whole_vocabulary(output, trained)                      inside `collect`: logits of all tensor-parallel ranks
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from megatron_ds import log
from megatron_ds.checkpoint.layout import Index
from megatron_ds.checkpoint.load import find, load
from megatron_ds.cli import arg
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import Tokenizer, build_tokenizer
from megatron_ds.errors import ConfigError, ConfigErrors, UserError
from megatron_ds.kernels.choose import choose
from megatron_ds.kernels.config import KernelConfig
from megatron_ds.kernels.products import Products
from megatron_ds.model.chunk import Lengths, ModelChunk
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.runtime import Runtime
from megatron_ds.model.zoo import build_model
from megatron_ds.parallel import context, launch
from megatron_ds.parallel.collectives import all_gather, all_reduce
from megatron_ds.parallel.config import ParallelConfig
from megatron_ds.parallel.context import Axis, ParallelContext, Sharding
from megatron_ds.parallel.rng import DropoutStreams
from megatron_ds.pipeline.executor import Executor, Microbatch, Wire
from megatron_ds.pipeline.schedule import build
from megatron_ds.plan import pad_vocabulary, stages_of
from megatron_ds.timers import Timers
from megatron_ds.training.resume import stored_model

DTYPES = MappingProxyType({"bfloat16": torch.bfloat16, "float16": torch.float16})


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Checkpoint and layout."""

    load: str | None = arg(None, "Directory that --save wrote to.", metavar="DIR")
    ckpt_step: int | None = arg(None, "This iteration, not the latest.", metavar="N")
    device: Literal["cpu", "cuda"] = arg("cpu", "Where to compute.")
    fp32: bool = arg(False, "Compute in fp32, whatever precision the weights were saved in.")
    tensor_model_parallel_size: int = arg(1, "Ranks that share every layer, whatever wrote the checkpoint.")
    pipeline_model_parallel_size: int = arg(1, "Ranks that share the stack of layers.")


@dataclass(frozen=True)
class Trained:
    """This rank's part of a model that was trained, and where it comes from."""

    config: TransformerConfig
    vocab: Vocab
    chunk: ModelChunk
    runtime: Runtime
    parallel: ParallelContext
    device: torch.device
    dtype: torch.dtype
    seq_length: int
    max_positions: int
    iteration: int
    state: Mapping[str, Any]

    @property
    def has_outputs(self) -> bool:
        """True on the ranks of the last stage."""
        return self.parallel.pp.is_last

    @property
    def writes(self) -> bool:
        """True on the one rank of each replica that has outputs to write."""
        return self.parallel.pp.is_last and self.parallel.tp.is_first

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        Raises: ConfigError if the checkpoint names none, DataError if its files are gone
        """
        return build_tokenizer(TokenizerConfig(**self.state["tokenizer"]))


@dataclass(frozen=True)
class Inputs:
    """What a model reads, under the names of transformers; `documents` is the attention mask, where equal ids meet.

    Shapes: each [b, s]; decoder_input_ids [b, decoder s]
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, positions, and the decoder's positions (0 where there is none)."""
        decoder = 0 if self.decoder_input_ids is None else self.decoder_input_ids.shape[1]
        return self.input_ids.shape[0], self.input_ids.shape[1], decoder

    def microbatches(self, rows: int) -> Iterator[Inputs]:
        """The same in parts of at most `rows` rows."""
        for first in range(0, len(self.input_ids), rows):
            yield self._each(itemgetter(slice(first, first + rows)))

    def for_model(self, trained: Trained) -> Inputs:
        """The same on the model's device, with what was left out: positions from 0, one segment, all in sight."""
        ids, kind = self.input_ids, trained.config.model_type
        positions, types, documents = self.position_ids, self.token_type_ids, self.documents
        if kind == "GPT" and positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        if kind == "BERT" and types is None:
            types = torch.zeros_like(ids)
        if kind != "GPT" and documents is None:
            documents = torch.zeros_like(ids)
        whole = Inputs(ids, positions, documents, types, self.decoder_input_ids)
        return whole._each(lambda tensor: tensor.to(trained.device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        tensors = (getattr(self, field.name) for field in fields(self))
        return Inputs(*(None if tensor is None else change(tensor) for tensor in tensors))  # type: ignore[arg-type]


def open_checkpoint(options: InferenceConfig, *, data_parallel: bool = False) -> Trained:
    """Join the other ranks, if there are any, and load this rank's part of the model.

    data_parallel: ranks beyond one replica are welcome; each tp x pp of them hold the whole model.
    Comm:   rendezvous of the whole world
    Raises: ConfigError, CheckpointError
    """
    launch.adopt_environment()
    if options.load is None:
        raise ConfigError("--load", "nothing", "the directory of a checkpoint", "--load runs/gpt/checkpoints")
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    index = find(options.load, options.ckpt_step).index
    check_layout(stored_model(index), tp, pp, log.world_size(), data_parallel)
    device = _device(options.device)
    sizes = {"pp": pp, "dp": log.world_size() // (tp * pp), "cp": 1, "tp": tp}
    asked = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, device=options.device)
    return _load(index, context.start(asked, sizes, device), device, options.fp32)


def load_trained(directory: str, step: int | None = None, device: str = "cpu", *, fp32: bool = False) -> Trained:
    """The whole model on this process alone.

    Raises: CheckpointError
    """
    return _load(find(directory, step).index, ParallelContext.solo(), torch.device(device), fp32)


def _load(index: Index, parallel: ParallelContext, device: torch.device, fp32: bool) -> Trained:
    state, config, tp = index.state, stored_model(index), parallel.tp
    vocab, lengths = Vocab(state["vocab_size"], pad_vocabulary(state["vocab_size"], tp.size)), _lengths(state)
    dtype = torch.float32 if fp32 else DTYPES.get(state["dtype"], torch.float32)
    width = config.hidden_size or 96
    kernels = choose(KernelConfig(), device, dtype, head_size=config.head_size, hidden_size=width).kernels
    runtime = Runtime(Sharding(tp), kernels, DropoutStreams(0, device_type=device.type))
    positions = state["max_positions"]
    cut = ParallelConfig(pipeline_model_parallel_size=parallel.pp.size, pp_partition_method="uniform")
    (stage,) = stages_of(config, cut, lengths, vocab, positions)[parallel.pp.rank]
    chunk = build_model(config, vocab, stage, max_positions=positions, runtime=runtime, device=device, dtype=dtype)
    values = {name: parameter.data for name, parameter in chunk.named_parameters()}
    for tensor in values.values():
        tensor.zero_()  # rows of a padded vocabulary are in no checkpoint
    rows = chunk.table().items()
    load(index, [p for name, spec in rows for p in spec.pieces(values[name], tp.rank, tp.size, f"model/{name}")])
    chunk.eval()
    return Trained(
        config, vocab, chunk, runtime, parallel, device, dtype, lengths.tokens, positions, index.iteration, state
    )


def _lengths(state: Mapping[str, Any]) -> Lengths:
    """Positions of a sample; a checkpoint from before there was T5 does not speak of a decoder."""
    return Lengths(state["seq_length"], state.get("decoder_seq_length") or 0)


@torch.inference_mode()
def run(trained: Trained, batches: Sequence[Inputs], collect: Callable[[int, Any], None]) -> None:
    """Send batches through the stages; on the last one `collect(number, output)` gets what comes out of each, in order.

    Shapes: output of GPT and T5 [s, b, v/tp], of BERT that and [b, 2] (None without a binary head)
    Comm:   the stages' transfers; batches of one shape follow each other without waiting
    """
    numbered = [(number, batch.for_model(trained)) for number, batch in enumerate(batches)]
    for shape, group in groupby(numbered, key=lambda item: item[1].shape):
        _run_alike(trained, shape, list(group), collect)


def _run_alike(
    trained: Trained,
    shape: tuple[int, int, int],
    batches: list[tuple[int, Inputs]],
    collect: Callable[[int, Any], None],
) -> None:
    call, pp = _CALLS[trained.config.model_type], trained.parallel.pp
    nothing = torch.zeros((), device=trained.device)

    def forward_step(item: tuple[int, Inputs], model: Any, upstream: torch.Tensor | None) -> Any:
        number, batch = item

        def keep(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
            collect(number, output)
            return nothing, nothing

        return call(model, batch, upstream), keep

    rows, lengths = shape[0], Lengths(*shape[1:])
    executor = Executor(
        [trained.chunk],
        forward_step,
        _NoGradients(),
        pp=pp,
        wire=Wire(trained.chunk.wire_shape(lengths, rows), trained.dtype, trained.device),
        streams=trained.runtime.streams,
        weight_grads=trained.runtime.weight_grads,
    )
    actions = build("forward", pp.size, 1, len(batches))[pp.rank]
    executor.run(actions, [Microbatch(item, 0) for item in batches], Timers())


def _gpt(model: Any, batch: Inputs, upstream: torch.Tensor | None) -> Any:
    return model(batch.input_ids, batch.position_ids, upstream, None, batch.documents)


def _bert(model: Any, batch: Inputs, upstream: torch.Tensor | None) -> Any:
    return model(batch.input_ids, batch.token_type_ids, batch.documents, upstream, None, None, batch.position_ids)


def _t5(model: Any, batch: Inputs, upstream: torch.Tensor | None) -> Any:
    return model(batch.input_ids, batch.decoder_input_ids, batch.documents, upstream)


_CALLS: Mapping[str, Callable[[Any, Inputs, torch.Tensor | None], Any]] = MappingProxyType(
    {"GPT": _gpt, "BERT": _bert, "T5": _t5}
)


class _NoGradients:
    """Where gradients go when there is no backward."""

    def arm(self, chunk: int, still_missing: Sequence[torch.Tensor] | None) -> None:
        raise AssertionError("a backward without training")

    def accumulate(self, weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, products: Products) -> None:
        raise AssertionError("a gradient without training")

    def finish(self, chunk: int) -> None:
        raise AssertionError("a reduction without training")


def whole_vocabulary(logits: torch.Tensor, trained: Trained) -> torch.Tensor:
    """Logits of every token id, without padding, in fp32.

    Shapes: [..., v/tp] -> [..., v]
    Comm:   all-gather over tp
    """
    full = all_gather(logits.movedim(-1, 0).contiguous(), trained.parallel.tp)
    return full[: trained.vocab.size].movedim(0, -1).float()


def from_last_stage(tensor: torch.Tensor, pp: Axis) -> torch.Tensor:
    """The last stage's tensor on every stage; what the others give only has its shape and dtype.

    Comm: all-reduce over pp
    """
    return all_reduce(tensor if pp.is_last else torch.zeros_like(tensor), pp)


def check_layout(model: TransformerConfig, tp: int, pp: int, world_size: int, data_parallel: bool) -> None:
    """Whether this many ranks can share the model so.

    Raises: ConfigErrors
    """
    by_tp, by_pp = f"--tensor-model-parallel-size {tp}", f"--pipeline-model-parallel-size {pp}"
    flags, errors = f"{by_tp} {by_pp}", []
    if tp < 1 or pp < 1:
        raise ConfigError(flags, f"{tp} and {pp}", "1 or more", "leave them out")
    if world_size % (tp * pp) or (world_size != tp * pp and not data_parallel):
        expected = f"{'a multiple of ' if data_parallel else ''}{tp * pp}"
        fix = f"torchrun --nproc-per-node {tp * pp}" if tp * pp > 1 else "start it without torchrun"
        errors.append(ConfigError(flags, f"{world_size} ranks", f"{expected} of them", fix))
    shared = {
        "attention heads": model.num_attention_heads or 1,
        "key/value heads": model.kv_heads,
        "MLP features": model.ffn_size,
    }
    for what, count in shared.items():
        if count % tp:
            errors.append(ConfigError(by_tp, f"a model of {count} {what}", f"a divisor of {count}", "a smaller one"))
    if pp > model.total_layers:
        errors.append(ConfigError(by_pp, f"a model of {model.total_layers} layers", "a layer on every stage"))
    if errors:
        raise ConfigErrors(errors)


def check_output(flag: str, path: str | None) -> None:
    """Whether a file can be written, found out before the work: on every rank, for any of them may have to.

    Raises: ConfigError
    """
    if path is None:
        return
    folder = Path(path).absolute().parent
    trouble = "a directory" if Path(path).is_dir() else f"no directory {folder}" if not folder.is_dir() else ""
    if trouble or not os.access(folder, os.W_OK):
        found = trouble or f"{folder}, which is not writable"
        raise ConfigError(f"{flag} {path}", found, "a file in a directory to write to", "another path")


def _device(wanted: str) -> torch.device:
    if wanted == "cpu":
        return torch.device("cpu")
    local, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= visible:
        raise ConfigError("--device cuda", f"local rank {local}, {visible} GPUs", "a GPU per rank", "--device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def guarded(work: Callable[[], int]) -> int:
    """Run a tool; a user's mistake becomes one message and an exit code.

    A mistake that every rank finds is told by rank 0: the others wait for the launcher to stop them, and speak only if
    it has not.
    """
    try:
        code = work()
    except UserError as error:
        if log.rank() > 0:
            time.sleep(5.0)
        where = f"[rank {log.rank()}] " if log.rank() else ""
        print(f"{where}error: {error.render()}", file=sys.stderr, flush=True)
        return error.exit_code
    context.stop()
    return code
