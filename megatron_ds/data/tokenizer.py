"""Text to ids and back, under Megatron's names, from local files only."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from megatron_ds.data.bpe_ranks import GPT2_PATTERN, tiktoken_ranks
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.errors import ConfigError, DataError

_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<EOD>", "<eod>", "<|im_end|>")


class Tokenizer(Protocol):
    """What data, training and sampling need to know of a tokenizer."""

    @property
    def name(self) -> str:
        """Megatron's name of its type."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eod(self) -> int:
        """Id that ends a document."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; the name of a special token within it is ordinary text."""
        ...

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of these ids."""
        ...

    def fingerprint(self) -> str:
        """Hash of its kind and of its files' bytes: equal only where the same text gets the same ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalTokenizer:
    """A tokenizer library behind the protocol, with names for ids that we add after its own."""

    name: str
    own_size: int
    added: tuple[str, ...]
    eod: int
    encode_batch: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    digest: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.own_size + len(self.added)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self.encode_batch(texts)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of these ids; ids that we added read as their names."""
        parts = []
        for is_own, group in groupby(map(int, ids), lambda token: token < self.own_size):
            run = list(group)
            parts.append(self.decode(run) if is_own else "".join(self.added[i - self.own_size] for i in run))
        return "".join(parts)

    def fingerprint(self) -> str:
        """Hash of kind and files."""
        return self.digest


def build_tokenizer(config: TokenizerConfig, default_type: str = "GPT2BPETokenizer") -> Tokenizer:
    """The tokenizer that the flags describe.

    Raises: ConfigError for an unknown type or a flag that is not given, DataError for a missing or damaged file
    """
    name = config.tokenizer_type or default_type
    if name not in _KINDS:
        near = difflib.get_close_matches(name, _KINDS, n=1, cutoff=0) or [default_type]
        raise ConfigError(
            "--tokenizer-type", found=name, expected=f"one of {', '.join(_KINDS)}", fix=f"--tokenizer-type {near[0]}"
        )
    return _KINDS[name].build(config, name)


def planned_vocab_size(config: TokenizerConfig, default_type: str = "GPT2BPETokenizer") -> tuple[int, str]:
    """The vocabulary's size, and where the number comes from; files that are not here are no fault.

    Raises: ConfigError where nothing tells the size
    """
    name = config.tokenizer_type or default_type
    kind = _KINDS.get(name)
    if kind is None or not kind.flags or all(_given(config, flag) for flag in kind.flags):
        return build_tokenizer(config, default_type).vocab_size, f"counted by {name}"
    absent = f"the files of {name} are not here"
    if config.vocab_size is not None:
        return config.vocab_size + config.vocab_extra_ids, f"--vocab-size, for {absent}"
    if kind.usual_size is None:
        raise ConfigError(
            f"--{kind.flags[0]}", found=absent, expected="the file, or --vocab-size", fix="--vocab-size 32000, say"
        )
    return kind.usual_size + config.vocab_extra_ids, f"the usual {kind.usual_size}, for {absent}"


def _given(config: TokenizerConfig, flag: str) -> bool:
    path = vars(config)[flag.replace("-", "_")]
    return path is not None and Path(path).exists()


def _file(config: TokenizerConfig, flag: str, name: str) -> Path:
    """The path that a flag gives, which must be there: nothing is ever downloaded."""
    given = vars(config)[flag.replace("-", "_")]
    if given is None:
        raise ConfigError(
            f"--{flag}", found="nothing", expected=f"a path, for --tokenizer-type {name}", fix=f"--{flag} PATH"
        )
    path = Path(given)
    if not path.exists():
        raise DataError(
            f"--{flag} {given}",
            found="no such file",
            expected=f"a local file for {name}",
            fix="nothing is downloaded: give its path",
        )
    return path


def _digest(kind: str, files: Sequence[Path], *facts: object) -> str:
    digest = hashlib.sha256(repr((kind, *facts)).encode())
    for path in files:
        content = path.read_bytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _extra_ids(config: TokenizerConfig) -> tuple[str, ...]:
    return tuple(f"<extra_id_{i}>" for i in range(config.vocab_extra_ids))


def _gpt2_bpe(config: TokenizerConfig, name: str) -> Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt: through tiktoken where that is exact, else through tokenizers."""
    files = [_file(config, "vocab-file", name), _file(config, "merge-file", name)]
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    try:
        vocab, merges = models.BPE.read_file(str(files[0]), str(files[1]))
        model = models.BPE(vocab=vocab, merges=merges)
    except Exception as exc:  # the library raises bare Exception
        raise _unreadable("--vocab-file, --merge-file", exc, "vocab.json and merges.txt of one tokenizer") from exc
    if "<|endoftext|>" not in vocab:
        raise DataError(
            f"--vocab-file {files[0]}",
            found="no token <|endoftext|>",
            expected="one, to end documents with",
            fix="train the BPE with <|endoftext|> among its special tokens",
        )
    library: Any = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in library.encode_batch_fast(list(texts), add_special_tokens=False)]

    ranks = tiktoken_ranks(vocab, merges, lambda word: [token.id for token in model.tokenize(word)])
    return LocalTokenizer(
        name=name,
        own_size=max(vocab.values()) + 1,
        added=_extra_ids(config),
        eod=vocab["<|endoftext|>"],
        encode_batch=encode_batch if ranks is None else _tiktoken(ranks) or encode_batch,
        decode=lambda ids: library.decode(ids, skip_special_tokens=False),
        digest=_digest("GPT2BPETokenizer", files, config.vocab_extra_ids),
    )


def _tiktoken(ranks: dict[bytes, int]) -> Callable[[Sequence[str]], list[list[int]]] | None:
    try:
        import tiktoken
    except ImportError:
        return None
    encoding = tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def _sentencepiece(config: TokenizerConfig, name: str) -> Tokenizer:
    """A SentencePiece model under one of three names.

    SentencePieceTokenizer adds <CLS> <SEP> <EOD> <MASK> and missing pad, bos and eos, and ends documents with <EOD>;
    the others end them with the model's eos. Llama2Tokenizer begins each text with bos.
    """
    path = _file(config, "tokenizer-model", name)
    from sentencepiece import SentencePieceProcessor

    try:
        model: Any = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as exc:
        raise _unreadable(f"--tokenizer-model {path}", exc, "a SentencePiece model") from exc
    own_size = model.get_piece_size()
    added = _extra_ids(config)
    eod, bos = model.eos_id(), []
    if name == "SentencePieceTokenizer":
        unnamed = [(model.pad_id(), "<PAD>"), (model.bos_id(), "<BOS>"), (model.eos_id(), "<EOS>")]
        wanted = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", *(special for token, special in unnamed if token < 0)]
        pieces = {model.id_to_piece(token): token for token in range(own_size)}
        added = (*(special for special in wanted if special not in pieces), *added)
        eod = pieces.get("<EOD>", own_size + added.index("<EOD>") if "<EOD>" in added else -1)
    elif name == "Llama2Tokenizer":
        bos = [model.bos_id()]
    if eod < 0 or (bos and bos[0] < 0):
        raise DataError(
            f"--tokenizer-model {path}",
            found="a model without bos or eos",
            expected=f"both, for {name}",
            fix="--tokenizer-type GPTSentencePieceTokenizer, which needs eos only",
        )
    return LocalTokenizer(
        name=name,
        own_size=own_size,
        added=added,
        eod=eod,
        encode_batch=lambda texts: [bos + ids for ids in model.encode(list(texts), num_threads=1)],
        decode=model.decode,
        digest=_digest(name, [path], config.vocab_extra_ids),
    )


def _hugging_face(config: TokenizerConfig, name: str) -> Tokenizer:
    """A tokenizer.json, read with `tokenizers`; like transformers it adds the tokens its post-processor asks for."""
    path = _file(config, "tokenizer-model", name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise DataError(
            f"--tokenizer-model {path.parent}",
            found="a folder without tokenizer.json",
            expected="one",
            fix="if it holds a SentencePiece tokenizer.model: --tokenizer-type Llama2Tokenizer and that file",
        )
    from tokenizers import Tokenizer as Library

    try:
        library: Any = Library.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception
        raise _unreadable(f"--tokenizer-model {path}", exc, "a tokenizer.json of Hugging Face tokenizers") from exc
    library.no_truncation()
    library.no_padding()
    vocab: dict[str, int] = library.get_vocab(with_added_tokens=True)
    eod = _end_of_text(path, vocab)
    return LocalTokenizer(
        name=name,
        own_size=max(vocab.values()) + 1,
        added=_extra_ids(config),
        eod=eod,
        encode_batch=lambda texts: [found.ids for found in library.encode_batch_fast(list(texts))],
        decode=lambda ids: library.decode(ids, skip_special_tokens=False),
        digest=_digest("HFTokenizer", [path], eod, config.vocab_extra_ids),
    )


def _end_of_text(path: Path, vocab: Mapping[str, int]) -> int:
    """The id of the eos_token named in the files beside tokenizer.json, else of a well-known name."""
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            named = json.loads((path.parent / beside).read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            continue
        text = str(named.get("content") if isinstance(named, dict) else named)
        if text in vocab:
            return vocab[text]
    for text in _EOD_NAMES:
        if text in vocab:
            return vocab[text]
    raise DataError(
        f"--tokenizer-model {path}",
        found="no eos_token that its vocabulary holds",
        expected="tokenizer_config.json or special_tokens_map.json beside it that names one",
        fix="copy that file from where the tokenizer comes from",
    )


def _null(config: TokenizerConfig, name: str) -> Tokenizer:
    """Texts are ids already: whole numbers between blanks."""
    size = config.vocab_size
    if size is None or size < 1:
        raise ConfigError(
            "--vocab-size",
            found=str(size),
            expected=f"a number >= 1, for --tokenizer-type {name}",
            fix="--vocab-size 50256, say",
        )
    eod = size if config.null_tokenizer_eod_id is None else config.null_tokenizer_eod_id
    if not 0 <= eod <= size:
        raise ConfigError(
            "--null-tokenizer-eod-id", found=str(eod), expected=f"0 to {size} (--vocab-size)", fix="leave it out"
        )
    return LocalTokenizer(
        name=name,
        own_size=size + 1,
        added=_extra_ids(config),
        eod=eod,
        encode_batch=lambda texts: [_numbers(text) for text in texts],
        decode=lambda ids: " ".join(map(str, ids)),
        digest=_digest(name, [], size, eod, config.vocab_extra_ids),
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as exc:
        raise DataError("text for NullTokenizer", found=str(exc), expected="whole numbers between blanks") from exc


def _unreadable(subject: str, exc: Exception, expected: str) -> DataError:
    return DataError(subject, found=str(exc).strip() or type(exc).__name__, expected=expected)


@dataclass(frozen=True)
class _Kind:
    build: Callable[[TokenizerConfig, str], Tokenizer]
    flags: tuple[str, ...]
    usual_size: int | None


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "GPT2BPETokenizer": _Kind(_gpt2_bpe, ("vocab-file", "merge-file"), 50257),
        "SentencePieceTokenizer": _Kind(_sentencepiece, ("tokenizer-model",), 32000),
        "GPTSentencePieceTokenizer": _Kind(_sentencepiece, ("tokenizer-model",), 32000),
        "Llama2Tokenizer": _Kind(_sentencepiece, ("tokenizer-model",), 32000),
        "HFTokenizer": _Kind(_hugging_face, ("tokenizer-model",), None),
        "HuggingFaceTokenizer": _Kind(_hugging_face, ("tokenizer-model",), None),
        "PretrainedFromHF": _Kind(_hugging_face, ("tokenizer-model",), None),
        "NullTokenizer": _Kind(_null, (), None),
    }
)
