"""One builder for each kind of tokenizer: files on disk -> LocalTokenizer; nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ds.data.bpe_ranks import GPT2_PATTERN, tiktoken_ranks
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.local_tokenizer import ROLES, LocalTokenizer, Vocabulary, extra_id
from megatron_ds.errors import ConfigError, DataError

BERT_ADDED = ("[BOS]", "[EOS]")
_END_OF_TEXT = "<|endoftext|>"
_EOD_NAMES = (_END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<EOD>", "<eod>", "<|im_end|>")
_SPACE = "\u2581"
"""How SentencePiece spells the blank before a word."""
_BYTE_SPACE = "\u0120"
"""How GPT-2's alphabet of bytes spells it."""
_USE_BERT = "--tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt, and preprocess with it"


def gpt2_bpe(config: TokenizerConfig, name: str) -> LocalTokenizer:
    """Byte-level BPE from vocab.json and merges.txt: through tiktoken where that is exact, else through tokenizers."""
    files = [_file(config, "vocab-file", name), _file(config, "merge-file", name)]
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    try:
        vocab, merges = models.BPE.read_file(str(files[0]), str(files[1]))
        model = models.BPE(vocab=vocab, merges=merges)
    except Exception as exc:  # the library raises bare Exception
        raise _unreadable("--vocab-file, --merge-file", exc, "vocab.json and merges.txt of one tokenizer") from exc
    if _END_OF_TEXT not in vocab:
        raise DataError(
            f"--vocab-file {files[0]}",
            found=f"no token {_END_OF_TEXT}",
            expected="one, to end documents with",
            fix=f"train the BPE with {_END_OF_TEXT} among its special tokens",
        )
    library: Any = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()

    def encode_batch(texts: Sequence[str], bare: bool) -> list[list[int]]:
        return [found.ids for found in library.encode_batch_fast(list(texts), add_special_tokens=False)]

    ranks = tiktoken_ranks(vocab, merges, lambda word: [token.id for token in model.tokenize(word)])
    return LocalTokenizer(
        name=name,
        vocabulary=Vocabulary.extended(vocab, _extra_ids(config)),
        eod=vocab[_END_OF_TEXT],
        roles={"bos": _END_OF_TEXT, "eos": _END_OF_TEXT},
        source=f"--vocab-file {files[0]}",
        remedy=_USE_BERT,
        continues=_unless_marked(_BYTE_SPACE, [_END_OF_TEXT]),
        encode_batch=encode_batch if ranks is None else _tiktoken(ranks) or encode_batch,
        decode=lambda ids: library.decode(ids, skip_special_tokens=False),
        digest=_digest("GPT2BPETokenizer", files, config.vocab_extra_ids),
    )


def _tiktoken(ranks: dict[bytes, int]) -> Callable[[Sequence[str], bool], list[list[int]]] | None:
    try:
        import tiktoken
    except ImportError:
        return None
    encoding = tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts, bare: [encoding.encode_ordinary(text) for text in texts]


def word_piece(config: TokenizerConfig, name: str) -> LocalTokenizer:
    """BERT's WordPiece from vocab.txt; [BOS] and [EOS] are added to it, and [SEP] ends documents."""
    path = _file(config, "vocab-file", name)
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    source, expected = f"--vocab-file {path}", "vocab.txt of a WordPiece: a token on each line"
    try:
        vocab = models.WordPiece.read_file(str(path))
    except Exception as exc:  # the library raises bare Exception
        raise _unreadable(source, exc, expected) from exc
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]
    if missing:
        raise DataError(
            source,
            found=f"no {', '.join(missing)}",
            expected=f"{expected}, these among them",
            fix="tools/train_tokenizer.py --kind wordpiece writes one",
        )
    library: Any = Library(models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=name == "BertWordPieceLowerCase"
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    return LocalTokenizer(
        name=name,
        vocabulary=Vocabulary.extended(vocab, (*BERT_ADDED, *_extra_ids(config))),
        eod=vocab["[SEP]"],
        roles={role: f"[{role.upper()}]" for role in ROLES},
        source=source,
        remedy="add the line {token} at its end, which moves no other token",
        continues=lambda piece: piece.startswith("##"),
        encode_batch=lambda texts, bare: [found.ids for found in library.encode_batch_fast(list(texts))],
        decode=lambda ids: library.decode(ids, skip_special_tokens=False),
        digest=_digest(name, [path], config.vocab_extra_ids),
    )


def sentence_piece(config: TokenizerConfig, name: str) -> LocalTokenizer:
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
    pieces = {model.id_to_piece(token): token for token in range(model.get_piece_size())}
    named = {"pad": model.pad_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    roles = {role: model.id_to_piece(token) for role, token in named.items() if token >= 0}
    added, bos = _extra_ids(config), []
    if name == "SentencePieceTokenizer":
        unnamed = [f"<{role.upper()}>" for role in named if role not in roles]
        added = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", *unnamed, *added)
        roles = {role: f"<{role.upper()}>" for role in ROLES} | roles
    elif name == "Llama2Tokenizer":
        bos = [named["bos"]]
    vocabulary = Vocabulary.extended(pieces, added)
    eod = vocabulary.ids["<EOD>"] if name == "SentencePieceTokenizer" else named["eos"]
    if eod < 0 or (bos and bos[0] < 0):
        raise DataError(
            f"--tokenizer-model {path}",
            found="a model without bos or eos",
            expected=f"both, for {name}",
            fix="--tokenizer-type GPTSentencePieceTokenizer, which needs eos only",
        )

    def encode_batch(texts: Sequence[str], bare: bool) -> list[list[int]]:
        found: list[list[int]] = model.encode(list(texts), num_threads=1)
        return found if bare else [bos + ids for ids in found]

    return LocalTokenizer(
        name=name,
        vocabulary=vocabulary,
        eod=eod,
        roles=roles,
        source=f"--tokenizer-model {path}",
        remedy="--tokenizer-type SentencePieceTokenizer, which adds it, and preprocess with it",
        continues=_unless_marked(_SPACE, {piece for piece, token in pieces.items() if model.is_control(token)}),
        encode_batch=encode_batch,
        decode=model.decode,
        digest=_digest(name, [path], config.vocab_extra_ids),
    )


def hugging_face(config: TokenizerConfig, name: str) -> LocalTokenizer:
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
    roles = _named_beside(path, vocab)
    eod = vocab[_end_of_document(path, vocab, roles)]

    def encode_batch(texts: Sequence[str], bare: bool) -> list[list[int]]:
        return [found.ids for found in library.encode_batch_fast(list(texts), add_special_tokens=not bare)]

    return LocalTokenizer(
        name=name,
        vocabulary=Vocabulary.extended(vocab, _extra_ids(config)),
        eod=eod,
        roles=roles,
        source=f"--tokenizer-model {path}",
        remedy="name one as {role}_token in tokenizer_config.json beside it",
        continues=_by_description(json.loads(path.read_text(encoding="utf-8"))),
        encode_batch=encode_batch,
        decode=lambda ids: library.decode(ids, skip_special_tokens=False),
        digest=_digest("HFTokenizer", [path], eod, config.vocab_extra_ids),
    )


def _named_beside(path: Path, vocab: Mapping[str, int]) -> dict[str, str]:
    """Special tokens that the files beside tokenizer.json name and its vocabulary holds."""
    found: dict[str, str] = {}
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            given = json.loads((path.parent / beside).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for role in ROLES if isinstance(given, dict) else ():
            token = given.get(f"{role}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text in vocab:
                found.setdefault(role, text)
    return found


def _end_of_document(path: Path, vocab: Mapping[str, int], roles: Mapping[str, str]) -> str:
    """The eos token, else a well-known name, else BERT's choice."""
    for text in (roles.get("eos"), *_EOD_NAMES, roles.get("sep")):
        if text in vocab:
            return str(text)
    raise DataError(
        f"--tokenizer-model {path}",
        found="no eos_token that its vocabulary holds",
        expected="tokenizer_config.json or special_tokens_map.json beside it that names one",
        fix="copy that file from where the tokenizer comes from",
    )


def _by_description(description: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which pieces continue a word, from the parts that tokenizer.json is made of; where they do not tell: none."""
    added = {token["content"] for token in description.get("added_tokens") or ()}
    model = description["model"]
    if model.get("type") == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return lambda piece: piece.startswith(prefix) and piece not in added
    for part in (*_parts(description.get("pre_tokenizer")), *_parts(description.get("decoder"))):
        if part["type"] == "ByteLevel":
            return _unless_marked(_BYTE_SPACE, added)
        if part["type"] == "Metaspace":
            return _unless_marked(part["replacement"], added)
        if part.get("pattern") == {"String": _SPACE}:
            return _unless_marked(_SPACE, added)
    return lambda piece: False


def _parts(description: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer or decoder, or those that it is a sequence of."""
    if description is not None and description["type"] == "Sequence":
        for part in description.get("pretokenizers") or description.get("decoders") or ():
            yield from _parts(part)
    elif description is not None:
        yield description


def _unless_marked(mark: str, whole: Container[str]) -> Callable[[str], bool]:
    """A piece continues a word unless it begins with the mark of a word's start or stands for no text."""
    return lambda piece: not piece.startswith(mark) and piece not in whole


def null(config: TokenizerConfig, name: str) -> LocalTokenizer:
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
        vocabulary=Vocabulary.extended({str(token): token for token in range(size + 1)}, _extra_ids(config)),
        eod=eod,
        roles={},
        source=f"--tokenizer-type {name}",
        remedy=_USE_BERT,
        continues=lambda piece: False,
        encode_batch=lambda texts, bare: [_numbers(text) for text in texts],
        decode=lambda ids: " ".join(map(str, ids)),
        digest=_digest(name, [], size, eod, config.vocab_extra_ids),
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as exc:
        raise DataError("text for NullTokenizer", found=str(exc), expected="whole numbers between blanks") from exc


def _file(config: TokenizerConfig, flag: str, name: str) -> Path:
    """The path that a flag gives, which must be there."""
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
    return tuple(map(extra_id, range(config.vocab_extra_ids)))


def _unreadable(subject: str, exc: Exception, expected: str) -> DataError:
    return DataError(subject, found=str(exc).strip() or type(exc).__name__, expected=expected)
