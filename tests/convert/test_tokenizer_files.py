"""Tokenizers travel with their models: the same ids from AutoTokenizer, from ours, and after a round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

from megatron_ds.convert.tokenizer_files import keep, special_ids, tokenizer_in, write_out
from megatron_ds.convert.weights import Weights
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import build_tokenizer
from megatron_ds.model.config import TransformerConfig

TEXTS = ["the house, built  twice", "def f(x):\n\treturn x + 1", "over and over the lazy dog"]
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog and back again"] * 3


def weights(tokenizer: TokenizerConfig | None, vocab_size: int) -> Weights:
    return Weights(
        config=TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2),
        vocab_size=vocab_size,
        max_positions=8,
        seq_length=8,
        dtype=torch.float32,
        iteration=0,
        tokenizer=tokenizer,
        names=(),
        read=torch.empty,
    )


@pytest.fixture
def gpt2(tmp_path: Path) -> TokenizerConfig:
    library: Any = ByteLevelBPETokenizer()
    library.train_from_iterator(CORPUS, vocab_size=280, special_tokens=["<|endoftext|>"])
    library.save_model(str(tmp_path), "my")
    vocab, merges = str(tmp_path / "my-vocab.json"), str(tmp_path / "my-merges.txt")
    return TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab, merge_file=merges, vocab_extra_ids=3)


@pytest.fixture
def word_piece(tmp_path: Path) -> TokenizerConfig:
    library: Any = BertWordPieceTokenizer(lowercase=True)
    library.train_from_iterator(CORPUS, vocab_size=90)
    library.save_model(str(tmp_path))
    return TokenizerConfig(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("name", ["gpt2", "word_piece"])
def test_out(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config = request.getfixturevalue(name)
    ours, out = build_tokenizer(config), tmp_path / "out"
    write_out(weights(config, ours.vocab_size), out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.tokenize(text)
    if name == "word_piece":
        assert theirs.convert_ids_to_tokens(theirs("dog")["input_ids"]) == ["[CLS]", "dog", "[SEP]"]
        assert theirs.mask_token == "[MASK]"
    else:
        assert theirs.eos_token_id == ours.eod
        assert theirs.convert_tokens_to_ids("<extra_id_1>") == ours.sentinels[1]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("SentencePieceTokenizer", "unigram", {"user_defined_symbols": ["fox", "<usr>"]}),
        ("GPTSentencePieceTokenizer", "bpe", {"add_dummy_prefix": False}),
        (
            "Llama2Tokenizer",
            "bpe",
            {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
            | {"allow_whitespace_only_pieces": True, "split_digits": True},
        ),
    ],
)
def test_sentencepiece_out(name: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("\n".join(CORPUS * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "my"), vocab_size=400, model_type=kind,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    config = TokenizerConfig(tokenizer_type=name, tokenizer_model=str(tmp_path / "my.model"))
    ours, out = build_tokenizer(config), tmp_path / "out"
    write_out(weights(config, ours.vocab_size), out)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert len(theirs) == ours.vocab_size
    for text in [*TEXTS, "", "  two   blanks ", "na\u00efve \ufb01x \u65e5\u672c", " x\n\n  y", "<usr>fox 2026"]:
        assert theirs(text)["input_ids"] == ours.tokenize(text), text
    assert theirs.decode(ours.tokenize("the lazy dog"), skip_special_tokens=True) == "the lazy dog"


@pytest.mark.parametrize("name", ["gpt2", "word_piece"])
def test_kept_beside_a_checkpoint_and_out_of_it_again(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(name)
    ours = build_tokenizer(config)
    kept = keep(weights(config, ours.vocab_size), tmp_path, tmp_path).tokenizer
    assert kept is not None
    assert build_tokenizer(kept).fingerprint() == ours.fingerprint()
    assert str(tmp_path / "tokenizer") in str(kept.vocab_file)


def test_a_published_directory_comes_out_as_it_went_in(gpt2: TokenizerConfig, tmp_path: Path) -> None:
    source = tmp_path / "published"
    write_out(weights(gpt2, 283), source)
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": 0}))
    found = tokenizer_in(source, 290)
    assert found is not None and found.tokenizer_type == "HFTokenizer"
    assert build_tokenizer(found).vocab_size == 290, "rows that the tokenizer has no name for"
    (tmp_path / "ours").mkdir()
    kept = keep(weights(found, 290), tmp_path / "ours", tmp_path / "ours")
    assert special_ids(kept, "GPT") == {"bos_token_id": 5, "eos_token_id": 0}
    write_out(kept, tmp_path / "out")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_a_vocabulary_of_words_alone_becomes_a_tokenizer_of_as_many(
    word_piece: TokenizerConfig, tmp_path: Path
) -> None:
    """Our own type adds [BOS] and [EOS]; a published BERT has no rows for them."""
    size = len((tmp_path / "vocab.txt").read_text().splitlines())
    found = tokenizer_in(tmp_path, size)
    assert found is not None and found.tokenizer_type == "BertWordPieceLowerCase"
    kept = keep(weights(found, size), tmp_path, tmp_path).tokenizer
    assert kept is not None and kept.tokenizer_type == "HFTokenizer"
    ours = build_tokenizer(kept)
    assert ours.vocab_size == size
    bare = ours.tokenize_batch(TEXTS, bare=True)
    assert bare == build_tokenizer(word_piece).tokenize_batch(TEXTS, bare=True)
    assert ours.tokenize("dog") == [ours.cls, *ours.tokenize_batch(["dog"], bare=True)[0], ours.sep]


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    assert tokenizer_in(tmp_path, 9) is None
    (tmp_path / "out").mkdir()
    write_out(weights(None, 9), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert special_ids(weights(None, 9), "T5")["decoder_start_token_id"] == 0
