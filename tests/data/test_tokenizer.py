"""Each adapter against its library, with tokenizers trained here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_ds.data import tokenizer as adapter
from megatron_ds.data.bpe_ranks import tiktoken_ranks
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import build_tokenizer, planned_vocab_size
from megatron_ds.errors import ConfigError, DataError

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
