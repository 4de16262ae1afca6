"""Checkpoints of Megatron-LM and Megatron-DeepSpeed, in whichever of their formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType

from megatron_ds import log
from megatron_ds.convert.megatron_args import tokenizer_config, transformer_config
from megatron_ds.convert.megatron_classic import FILE, read_classic
from megatron_ds.convert.megatron_deepspeed import is_deepspeed, read_deepspeed
from megatron_ds.convert.megatron_join import Joiner, joined_shape
from megatron_ds.convert.megatron_source import Source, broken
from megatron_ds.convert.weights import Weights
from megatron_ds.errors import CheckpointError
from megatron_ds.model.chunk import Stage
from megatron_ds.model.config import ModelType, TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.zoo import build_model

_TRACKER = "latest_checkpointed_iteration.txt"
_WORD_TABLE = "embedding.word_embeddings.weight"


def load_megatron(directory: str, model_type: ModelType, true_vocab_size: int | None = None) -> Weights:
    """Open the newest checkpoint in a directory, or the one that the directory is; values are read when asked for.

    true_vocab_size: how many rows of the vocabulary are no padding; without it all are kept, and a line says so.
    Raises: CheckpointError for one that is missing, damaged, of another model, or of a kind that we cannot hold
    """
    path = _step(Path(directory))
    source = read_deepspeed(path, model_type) if is_deepspeed(path) else read_classic(path, model_type)
    config = transformer_config(source.args, model_type)
    config = _as_stored(config, source)
    max_positions = config.max_position_embeddings
    assert max_positions
    joiner = _joiner(config, source, true_vocab_size)
    _check(source, config, max_positions)
    pieces = MappingProxyType(source.pieces)
    seq_length = source.args.get(int, "encoder_seq_length", "seq_length")
    return Weights(
        config=config,
        vocab_size=joiner.vocab_size,
        max_positions=max_positions,
        seq_length=seq_length or max_positions,
        decoder_seq_length=source.args.get(int, "decoder_seq_length") if model_type == "T5" else None,
        dtype=source.pieces[_WORD_TABLE][0].dtype,
        iteration=source.iteration,
        tokenizer=tokenizer_config(source.args),
        names=tuple(source.pieces),
        read=lambda name: joiner.join(name, pieces[name]),
    )


def _step(directory: Path) -> Path:
    """The directory of one iteration: the given one, or the one that a file of its own names as newest."""
    if not directory.is_dir():
        found = "not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(str(directory), found, "a directory that Megatron saved to", "correct --load-dir")
    if is_deepspeed(directory) or any(directory.glob(f"mp_rank_*/{FILE}")):
        return directory
    for pointer in ("latest", "latest_universal", _TRACKER):
        if (directory / pointer).is_file():
            text = (directory / pointer).read_text(encoding="utf-8", errors="replace").strip()
            name = f"iter_{int(text):07d}" if pointer == _TRACKER and text.isdecimal() else text
            if Path(name).name != name or not (directory / name).is_dir():
                raise broken(directory / pointer, f"the name {name!r}"[:100], "a directory beside it")
            return _readable(directory / name)
    expected = f"{_TRACKER} or latest, or the files of one iteration"
    raise CheckpointError(str(directory), "no checkpoint of Megatron", expected, "correct --load-dir")


def _readable(path: Path) -> Path:
    if any(path.glob("*.distcp")):
        fix = "save it once more in Megatron-LM with --ckpt-format torch"
        raise CheckpointError(str(path), "Megatron-LM's torch_dist format", f"mp_rank_00/{FILE}", fix)
    if (path / "index.json").is_file():
        raise CheckpointError(str(path), "a checkpoint of megatron_ds", "one of Megatron", "--loader megatron_ds")
    return path


def _as_stored(config: TransformerConfig, source: Source) -> TransformerConfig:
    """What no option says: whether the logits have a bias. A tied head that was stored all the same is dropped."""
    if not config.untie_embeddings_and_output_weights:
        source.pieces.pop("output_layer.weight", None)
    return dataclasses.replace(config, lm_head_bias=config.model_type == "GPT" or "lm_head.bias" in source.pieces)


def _joiner(config: TransformerConfig, source: Source, true_vocab_size: int | None) -> Joiner:
    if _WORD_TABLE not in source.pieces or any(piece.dim() != 2 for piece in source.pieces[_WORD_TABLE]):
        raise broken(source.path, "no word embeddings")
    assert config.num_attention_heads and config.max_position_embeddings
    joiner = Joiner(
        heads=config.num_attention_heads,
        groups=config.kv_heads,
        head_size=config.head_size,
        max_positions=config.max_position_embeddings,
        vocab_size=sum(piece.shape[0] for piece in source.pieces[_WORD_TABLE]),
        qkv=source.qkv,
        kv=source.kv,
        gated=config.gated,
        up_first=config.glu_activation is not None,
    )
    rows, true_size = joiner.vocab_size, true_vocab_size or source.vocab_size
    if true_size is None:
        log.warn(
            f"{source.path}: all {rows} rows of the vocabulary are kept, padding included; --true-vocab-size N cuts it"
        )
        return joiner
    if not 0 < true_size <= rows:
        fix = "give the size of the tokenizer that the model was trained with"
        raise CheckpointError(f"--true-vocab-size {true_size}", f"{rows} rows in {source.path}", "at most as many", fix)
    return dataclasses.replace(joiner, vocab_size=true_size)


def _check(source: Source, config: TransformerConfig, max_positions: int) -> None:
    """Hold names and shapes against those of the model that the options describe."""
    rows = sum(piece.shape[0] for piece in source.pieces[_WORD_TABLE])
    whole = Stage(0, config.total_layers, True, True)
    model = build_model(config, Vocab(rows, rows), whole, max_positions=max_positions, device="meta")
    expected = {name: spec.shape for name, spec in model.table().items()}
    missing, extra = sorted(expected.keys() - source.pieces.keys()), sorted(source.pieces.keys() - expected.keys())
    for kind, names in (("lacks", missing), ("holds besides", extra)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            expectation = f"the parameters of the {config.model_type} that its options describe"
            raise broken(source.path, f"it {kind} {', '.join(names[:5])}{more}", expectation)
    for name, shape in expected.items():
        if joined_shape(name, source.pieces[name], max_positions) != shape:
            shapes = ", ".join(str(list(piece.shape)) for piece in source.pieces[name])
            raise broken(source.path, f"{name} in pieces {shapes}", f"pieces of {list(shape)}")
