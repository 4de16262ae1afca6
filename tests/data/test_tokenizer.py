"""Each adapter against its library, with tokenizers trained here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data import tokenizer_kinds as adapter
from megatron_ds.data.bpe_ranks import tiktoken_ranks
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import Tokenizer, build_tokenizer, planned_vocab_size
from megatron_ds.errors import ConfigError, DataError
from tests.data.word_pieces import bert_words, longest_first

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't care.",
    "Numbers: 12345 67 8, under_score, CamelCase; tabs\tand\n\n  new lines.   ",
    "Zwoelf laxe Typen \u00e4\u00f6\u00fc \u00df, \u65e5\u672c\u8a9e, \U0001f600 emoji!",
    "aaaa aaab abab baba abcabc cabcab " * 3,
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """vocab.json and merges.txt as `tokenizers` trains them, <|endoftext|> as id 0."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("bpe")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(CORPUS * 5, vocab_size=360, min_frequency=2, special_tokens=["<|endoftext|>"])
    library.save_model(str(folder))
    return TokenizerConfig(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece BPE of 120 pieces without pad."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sp") / "tok"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_prefix=str(prefix), vocab_size=120, model_type="bpe", minloglevel=2
    )
    return f"{prefix}.model"


def random_texts(count: int) -> list[str]:
    """Texts over letters, digits, blanks, signs, and letters of two to four bytes."""
    rng = random.Random(0)
    letters = "aabbccdetho THE'sldve  \n\t\r0129_.,!\u00e9\u00df\u0301\u65e5\u3000\u00a0\U0001f600\U0001d400<|>"
    return ["".join(rng.choices(letters, k=rng.randint(0, 60))) for _ in range(count)]


def test_gpt2_equals_tokenizers(bpe: TokenizerConfig) -> None:
    """Both ways to encode, the fast one among them, give the ids of the library that trained it."""
    from tokenizers import ByteLevelBPETokenizer

    found = build_tokenizer(bpe)
    library = ByteLevelBPETokenizer.from_file(bpe.vocab_file, bpe.merge_file)
    assert (found.name, found.vocab_size, found.eod) == ("GPT2BPETokenizer", 360, 0)
    texts = [*CORPUS, *random_texts(500), "a" * 5000, " " * 5000, "before <|endoftext|> after"]
    wanted = [library.encode(text).ids for text in texts]
    assert found.tokenize_batch(texts) == wanted and found.tokenize(texts[0]) == wanted[0]
    assert [found.detokenize(ids) for ids in wanted] == texts
    assert found.detokenize([0]) == "<|endoftext|>" and 0 not in found.tokenize("<|endoftext|>")


def test_tiktoken_is_used_and_equals_the_slow_way(bpe: TokenizerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(adapter, "_tiktoken", lambda ranks: used.append(len(ranks)))
    slow = build_tokenizer(bpe)
    monkeypatch.undo()
    texts = random_texts(500)
    assert used == [359] and slow.tokenize_batch(texts) == build_tokenizer(bpe).tokenize_batch(texts)


def test_ranks_are_refused_where_tiktoken_would_differ(tmp_path: Path) -> None:
    """`bc` before `ab` before (ab, c): the text abc is a+bc, yet tiktoken would join a and bc to the token abc."""
    from tokenizers import models

    from megatron_ds.data.bpe_ranks import byte_alphabet

    vocab = {letter: place for place, letter in enumerate(byte_alphabet())} | {"bc": 256, "ab": 257, "abc": 258}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    model = models.BPE(vocab=vocab, merges=merges)

    def split(word: str) -> list[int]:
        return [token.id for token in model.tokenize(word)]

    assert split("abc") == [vocab["a"], 256]
    assert tiktoken_ranks(vocab, merges, split) is None
    assert tiktoken_ranks(vocab, merges[:2], split) is not None
    swapped = vocab | {"bc": 257, "ab": 256}
    assert tiktoken_ranks(swapped, merges[:2], split) is None
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": 259}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\na b\nab c\n")
    config = TokenizerConfig(vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt"))
    assert build_tokenizer(config).tokenize("abc") == [vocab["a"], 256]


def test_extra_ids(bpe: TokenizerConfig) -> None:
    found = build_tokenizer(TokenizerConfig(vocab_file=bpe.vocab_file, merge_file=bpe.merge_file, vocab_extra_ids=3))
    assert found.vocab_size == 363
    assert found.detokenize([360, *found.tokenize("the dog"), 362]) == "<extra_id_0>the dog<extra_id_2>"


def test_sentencepiece_names(pieces: str) -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=pieces)
    text = "the lazy dog 12"
    plain = build_tokenizer(TokenizerConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=pieces))
    assert (plain.vocab_size, plain.eod, plain.tokenize(text)) == (120, 2, library.encode(text))
    llama = build_tokenizer(TokenizerConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=pieces))
    assert (llama.vocab_size, llama.eod, llama.tokenize(text)) == (120, 2, [1, *library.encode(text)])
    full = build_tokenizer(
        TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=pieces, vocab_extra_ids=2)
    )
    # <CLS> 120, <SEP> 121, <EOD> 122, <MASK> 123, and <PAD> 124, which the model lacks; then two extra ids
    assert (full.vocab_size, full.eod, full.tokenize(text)) == (127, 122, library.encode(text))
    assert full.detokenize([*library.encode(text), 122, 124, 126]) == text + "<EOD><PAD><extra_id_1>"


def write_hf(folder: Path, bpe: TokenizerConfig) -> None:
    from tokenizers import ByteLevelBPETokenizer, processors

    library = ByteLevelBPETokenizer.from_file(bpe.vocab_file, bpe.merge_file)
    library.add_special_tokens(["<bos>", "<stop>"])
    library.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 360)])
    library.enable_truncation(4)
    library.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["HFTokenizer", "HuggingFaceTokenizer", "PretrainedFromHF"])
def test_tokenizer_json(tmp_path: Path, bpe: TokenizerConfig, name: str) -> None:
    """Added tokens count, the post-processor's are added, nothing is cut short; eos from the file beside it."""
    write_hf(tmp_path, bpe)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        found = build_tokenizer(TokenizerConfig(tokenizer_type=name, tokenizer_model=str(path)))
        assert (found.vocab_size, found.eod) == (362, 361)
        plain = build_tokenizer(bpe).tokenize(CORPUS[0])
        assert found.tokenize(CORPUS[0]) == [360, *plain] and len(plain) > 10
    (tmp_path / "tokenizer_config.json").unlink()
    assert build_tokenizer(TokenizerConfig(tokenizer_type=name, tokenizer_model=str(tmp_path))).eod == 0
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<stop>"}))
    assert build_tokenizer(TokenizerConfig(tokenizer_type=name, tokenizer_model=str(tmp_path))).eod == 361


def test_null() -> None:
    found = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100))
    assert (found.vocab_size, found.eod, found.tokenize("5  99 0"), found.detokenize([5, 99])) == (
        101,
        100,
        [5, 99, 0],
        "5 99",
    )
    other = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100, null_tokenizer_eod_id=0)
    assert build_tokenizer(other).eod == 0
    with pytest.raises(DataError, match="x"):
        found.tokenize("1 x")


def test_fingerprint_follows_files_and_kind(tmp_path: Path, bpe: TokenizerConfig, pieces: str) -> None:
    assert bpe.vocab_file is not None and bpe.merge_file is not None
    first = build_tokenizer(bpe).fingerprint()
    copies = {name: tmp_path / name for name in ("vocab.json", "merges.txt")}
    copies["vocab.json"].write_bytes(Path(bpe.vocab_file).read_bytes())
    copies["merges.txt"].write_bytes(Path(bpe.merge_file).read_bytes())
    copied = TokenizerConfig(vocab_file=str(copies["vocab.json"]), merge_file=str(copies["merges.txt"]))
    assert build_tokenizer(copied).fingerprint() == first and len(first) == 64
    copies["merges.txt"].write_bytes(Path(bpe.merge_file).read_bytes().rsplit(b"\n", 2)[0] + b"\n")
    assert build_tokenizer(copied).fingerprint() != first
    kinds = ("Llama2Tokenizer", "GPTSentencePieceTokenizer")
    prints = {build_tokenizer(TokenizerConfig(tokenizer_type=k, tokenizer_model=pieces)).fingerprint() for k in kinds}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        ({"vocab_file": "/no/vocab.json", "merge_file": "/no/m"}, DataError, "--vocab-file /no/vocab.json"),
        ({}, ConfigError, "--vocab-file"),
        ({"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "/no/t"}, DataError, "--tokenizer-model /no/t"),
        ({"tokenizer_type": "HFTokenizer", "tokenizer_model": "gpt2"}, DataError, "nothing is downloaded"),
        ({"tokenizer_type": "NullTokenizer"}, ConfigError, "--vocab-size"),
        ({"tokenizer_type": "Gpt2"}, ConfigError, "GPT2BPETokenizer"),
    ],
)
def test_missing_things_name_their_flag(flags: dict[str, str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        build_tokenizer(TokenizerConfig(**flags))  # type: ignore[arg-type]


def test_damaged_files(tmp_path: Path, bpe: TokenizerConfig) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x00junk")
    for flags in (
        {"vocab_file": str(junk), "merge_file": bpe.merge_file},
        {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": str(junk)},
        {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(junk)},
        {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(tmp_path)},
    ):
        with pytest.raises(DataError):
            build_tokenizer(TokenizerConfig(**flags))  # type: ignore[arg-type]


def test_planned_size(bpe: TokenizerConfig) -> None:
    assert planned_vocab_size(bpe)[0] == 360
    assert planned_vocab_size(TokenizerConfig())[0] == 50257
    size, where = planned_vocab_size(TokenizerConfig(vocab_size=1000, vocab_extra_ids=5))
    assert size == 1005 and "--vocab-size" in where
    assert planned_vocab_size(TokenizerConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model="x"))[0] == 32000
    assert planned_vocab_size(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=7))[0] == 8
    with pytest.raises(ConfigError, match="--vocab-size"):
        planned_vocab_size(TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model="x"))


BERT_PIECES = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] the dog ##s cafe caf un ##aff ##able , ! \u65e5 \u672c ##x"


@pytest.fixture
def word_pieces(tmp_path: Path) -> Path:
    """A vocab.txt by hand: [PAD] is 0, ##x is 18."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT_PIECES.split()) + "\n", encoding="utf-8")
    return path


def bert(path: Path, **flags: Any) -> Tokenizer:
    config = TokenizerConfig(**{"tokenizer_type": "BertWordPieceLowerCase", "vocab_file": str(path), **flags})
    return build_tokenizer(config)


def test_word_piece_by_hand(word_pieces: Path) -> None:
    found = bert(word_pieces, vocab_extra_ids=2)
    text = "The  CAF\u00c9, unaffable dogs!\u65e5\u672c [MASK] dogx"
    # [MASK] in a text is a bracket, a word and a bracket, which this vocabulary lacks
    assert found.tokenize(text) == [6, 9, 14, 11, 12, 13, 7, 8, 15, 16, 17, 2, 2, 2, 7, 18]
    assert found.tokenize_batch(["", "the"], bare=True) == [[], [6]]
    # 19 tokens in the file; [BOS] 19, [EOS] 20, <extra_id_0> 21, <extra_id_1> 22
    assert (found.vocab_size, found.eod, found.sentinels) == (23, 4, (21, 22))
    assert (found.cls, found.sep, found.mask, found.pad, found.bos, found.eos) == (3, 4, 5, 0, 19, 20)
    assert [i for i in range(23) if found.continuations[i]] == [8, 12, 13, 18] and len(found.continuations) == 23
    assert found.random_ids.tolist() == list(range(23))
    assert found.detokenize([11, 12, 13, 7, 8, 21]) == "unaffable dogs<extra_id_0>"
    cased = bert(word_pieces, tokenizer_type="BertWordPieceCase")
    assert cased.tokenize("The the caf\u00e9 cafe") == [2, 6, 2, 9] and cased.sentinels == ()
    assert cased.vocab_size == 21 and cased.fingerprint() != bert(word_pieces).fingerprint()


def test_word_piece_names_what_the_vocabulary_lacks(tmp_path: Path, word_pieces: Path) -> None:
    path = tmp_path / "small.txt"
    path.write_text("[UNK]\n[CLS]\n[SEP]\n[EOS]\n")
    found = bert(path)
    assert (found.cls, found.sep, found.eos, found.bos, found.vocab_size) == (1, 2, 3, 4, 5)
    for role, token in (("mask", r"\[MASK\]"), ("pad", r"\[PAD\]")):
        with pytest.raises(DataError, match=rf"(?s)--vocab-file {path}.*no token {token}.*add the line {token}"):
            getattr(found, role)
    path.write_text("[UNK]\n[MASK]\n")
    with pytest.raises(DataError, match=r"no \[CLS\], \[SEP\]"):
        bert(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="a token on each line"):
        bert(path)


@pytest.mark.parametrize("lower", [True, False])
def test_word_piece_equals_its_definition_and_library(tmp_path: Path, lower: bool) -> None:
    from tokenizers import BertWordPieceTokenizer

    library = BertWordPieceTokenizer(lowercase=lower)
    library.train_from_iterator(CORPUS * 5, vocab_size=260, min_frequency=2, show_progress=False)
    library.save_model(str(tmp_path))
    lines = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocab = {piece: place for place, piece in enumerate(lines)}
    found = bert(tmp_path / "vocab.txt", tokenizer_type="BertWordPieceLowerCase" if lower else "BertWordPieceCase")
    texts = [*CORPUS, *random_texts(300), "a" * 100, "a" * 101, "x\u200by\ufffdz\x00.", "\u20ac5\u00a7\u2014q", ""]
    by_definition = [[i for word in bert_words(text, lower) for i in longest_first(word, vocab)] for text in texts]
    assert found.tokenize_batch(texts) == by_definition
    loaded = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=lower)
    assert [loaded.encode(text, add_special_tokens=False).ids for text in texts] == by_definition


def test_special_tokens_of_sentencepiece(pieces: str) -> None:
    """The model has <unk> 0, <s> 1, </s> 2 and no pad; its pieces that start with U+2581 start words."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=pieces)
    kind = {"tokenizer_model": pieces, "vocab_extra_ids": 2}
    full = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", **kind))  # type: ignore[arg-type]
    assert (full.cls, full.sep, full.mask, full.pad, full.bos, full.eos) == (120, 121, 123, 124, 1, 2)
    assert full.sentinels == (125, 126) and full.random_ids.tolist() == list(range(127))
    texts = [library.id_to_piece(i) for i in range(120)]
    wanted = [i for i, text in enumerate(texts) if text[0] != "\u2581" and text not in ("<s>", "</s>")]
    assert [i for i in range(127) if full.continuations[i]] == wanted and 10 < len(wanted) < 119
    llama = build_tokenizer(TokenizerConfig(tokenizer_type="Llama2Tokenizer", **kind))  # type: ignore[arg-type]
    assert llama.tokenize_batch(["the dog"], bare=True) == [library.encode("the dog")]
    assert (llama.bos, llama.eos, llama.sentinels) == (1, 2, (120, 121))
    with pytest.raises(DataError, match=r"(?s)no mask token.*SentencePieceTokenizer"):
        _ = llama.mask


def test_special_tokens_of_gpt2(bpe: TokenizerConfig) -> None:
    found = build_tokenizer(bpe)
    assert (found.bos, found.eos, found.sentinels) == (0, 0, ())
    vocab = json.loads(Path(str(bpe.vocab_file)).read_text())
    starts = {vocab[piece] for piece in vocab if piece.startswith("\u0120")} | {0}
    assert {*range(360)} - {*np.flatnonzero(found.continuations).tolist()} == starts and len(starts) > 5
    with pytest.raises(DataError, match=r"(?s)--vocab-file .*no mask token.*BertWordPieceLowerCase"):
        _ = found.mask


def test_special_tokens_of_tokenizer_json(tmp_path: Path, word_pieces: Path) -> None:
    """A BERT tokenizer of Hugging Face: [CLS] and [SEP] round a text, none round a sentence within one."""
    from tokenizers import BertWordPieceTokenizer

    BertWordPieceTokenizer(str(word_pieces)).save(str(tmp_path / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}, "pad_token": "[PAD]", "bos_token": "<none>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "[MASK]", "pad_token": "the"}))
    kind = {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(tmp_path)}
    found = build_tokenizer(TokenizerConfig(**kind))  # type: ignore[arg-type]
    assert (found.cls, found.sep, found.pad, found.mask, found.eod, found.vocab_size) == (3, 4, 0, 5, 4, 19)
    assert found.tokenize("dogs") == [3, 7, 8, 4] and found.tokenize_batch(["dogs"], bare=True) == [[7, 8]]
    assert [i for i in range(19) if found.continuations[i]] == [8, 12, 13, 18]
    with pytest.raises(DataError, match=r"(?s)no bos token.*bos_token in tokenizer_config.json"):
        _ = found.bos


PARTS: list[tuple[dict[str, Any], str]] = [
    ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "_"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}}, "\u0120"),
    ({"decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}}]}}, "\u2581"),
]


@pytest.mark.parametrize(("parts", "mark"), PARTS)
def test_words_by_the_parts_of_tokenizer_json(parts: dict[str, Any], mark: str) -> None:
    added = [{"id": 0, "content": "<s>"}]
    continues = adapter._by_description({"model": {"type": "BPE"}, "added_tokens": added, **parts})
    assert [continues(piece) for piece in (f"{mark}the", "the", mark, "<s>", ",")] == [False, True, False, False, True]


def test_sentinels_that_the_vocabulary_has(tmp_path: Path) -> None:
    """T5's own tokenizer numbers them downwards: they keep their ids, and only missing ones are added."""
    from tokenizers import Tokenizer, models

    vocab = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    Tokenizer(models.Unigram(vocab, 0)).save(str(tmp_path / "tokenizer.json"))
    kind = {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(tmp_path), "vocab_extra_ids": 3}
    found = build_tokenizer(TokenizerConfig(**kind))  # type: ignore[arg-type]
    assert found.sentinels == (4, 3, 5) and found.vocab_size == 6


def test_planned_size_of_word_pieces(word_pieces: Path) -> None:
    def planned(**flags: Any) -> int:
        return planned_vocab_size(TokenizerConfig(**flags))[0]

    assert planned(tokenizer_type="BertWordPieceLowerCase") == 30524
    assert planned(tokenizer_type="BertWordPieceCase", vocab_file="/no/v", vocab_extra_ids=100) == 28996 + 2 + 100
    assert planned(tokenizer_type="BertWordPieceLowerCase", vocab_size=1000) == 1002
    assert planned(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(word_pieces)) == 21
