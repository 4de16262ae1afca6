"""tools/evaluate.py measures what its definitions say, computed here target by target with the oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ds.data.indexed_builder import IndexedDatasetBuilder
from megatron_ds.training.scoring import UNSCORED, windows
from tests.helpers.ranks import run_ranks
from tests.reference import bert, gpt, t5
from tests.tools.written import BERT, GPT, T5, VOCAB, as_rank, run_tool, write_checkpoint
from tools import evaluate

END, LENGTH = VOCAB - 1, 8
TEXTS = ["5 17 3", "1  2 3 4\n5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", " ".join(["30 31"] * 7), "59"]
PARAMS = gpt.random_params(GPT, std=0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT whose texts are numbers, and beside it those texts."""
    out = write_checkpoint(tmp_path_factory.mktemp("gpt"), "GPT", PARAMS, seq_length=LENGTH)
    (out / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "\n")
    return out


def measure(saved: Path, *words: object) -> dict[str, Any]:
    outcome = run_tool(evaluate.main, "--load", saved, *words)
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def log_probability(context: Sequence[int], token: int) -> tuple[float, bool]:
    """Of a token behind a context; and whether it is the likeliest."""
    logits = gpt.forward(PARAMS, GPT, torch.tensor([list(context)]))[0, -1].double()
    return logits.log_softmax(-1)[token].item(), int(logits.argmax()) == token


def loss(tokens: Sequence[int], stride: int, given: int = 1) -> float:
    """Target t is read in the window that ends `stride` targets, or several times that, behind the first window."""
    total, last = 0.0, len(tokens) - 1
    for t in range(given, len(tokens)):
        later = max(0, math.ceil((t - LENGTH) / stride))
        end = min(last, LENGTH + later * stride)
        total -= log_probability(tokens[max(0, end - LENGTH) : t], tokens[t])[0]
    return total


@pytest.mark.parametrize("stride", [8, 3, 1])
def test_perplexity_is_the_sum_over_targets(saved: Path, stride: int) -> None:
    tokens = [[END, *map(int, text.split())] for text in TEXTS]
    total = sum(loss(row, stride) for row in tokens)
    count = 3 + 20 + 14 + 1
    words, size_bytes = count, sum(map(len, TEXTS))
    found = measure(saved, "--data", saved / "texts.jsonl", "--stride", stride, "--micro-batch-size", 3)
    assert (found["documents"], found["tokens"], found["words"], found["bytes"]) == (4, count, words, size_bytes)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size_bytes, rel=1e-5)


def test_windows_by_hand() -> None:
    tokens = list(range(10, 20))
    assert list(windows(tokens, 4, 4)) == [
        ([10, 11, 12, 13], [11, 12, 13, 14]),
        ([14, 15, 16, 17], [15, 16, 17, 18]),
        ([15, 16, 17, 18], [UNSCORED] * 3 + [19]),
    ]
    assert list(windows(tokens[:7], 4, 2)) == [
        ([10, 11, 12, 13], [11, 12, 13, 14]),
        ([12, 13, 14, 15], [UNSCORED] * 2 + [15, 16]),
    ]
    assert list(windows(tokens[:3], 4, 2, given=2)) == [([10, 11], [UNSCORED, 12])]
    assert list(windows(tokens[:1], 4, 2)) == []


def test_indexed_documents_are_measured_with_their_ends(saved: Path, tmp_path: Path) -> None:
    documents = [[[5, 17], [3, END]], [[9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 3]]]
    with IndexedDatasetBuilder(str(tmp_path / "set"), np.uint16) as builder:
        for sentences in documents:
            builder.add_document(np.concatenate(sentences), [len(one) for one in sentences])
        builder.finalize()
    total = loss([END, 5, 17, 3, END], 8) + loss([END, *documents[1][0]], 8)
    found = measure(saved, "--data-path", tmp_path / "set")
    assert (found["documents"], found["tokens"]) == (2, 15)
    assert found["loss"] == pytest.approx(total / 15, rel=1e-5)
    assert "bits_per_byte" not in found


def test_last_words(saved: Path, tmp_path: Path) -> None:
    long = [7, 6, 5, 4, 3, 2, 1, 2, 3]
    guess = max(range(VOCAB), key=lambda token: log_probability(long[-LENGTH:], token)[0])
    rows = [[5, 17, 3, 40], [*long, guess], [1, 2], [5, 17, 4]]
    scores = [log_probability(row[:-1][-LENGTH:], row[-1]) for row in rows]
    assert 0 < sum(right for _, right in scores) < 4
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"t": " ".join(map(str, row))}) + "\n" for row in rows))
    words = ("--data", tmp_path / "words.jsonl", "--json-key", "t", "--task", "lambada")
    found = measure(saved, *words)
    assert found["accuracy"] == sum(right for _, right in scores) / 4
    assert found["perplexity"] == pytest.approx(math.exp(-sum(score for score, _ in scores) / 4), rel=1e-4)
    first = measure(saved, *words, "--max-documents", 1)
    assert first["perplexity"] == pytest.approx(math.exp(-scores[0][0]), rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2), ()],
    ids=["tp2", "pp2", "dp2"],
)
def test_any_layout(saved: Path, layout: tuple[object, ...]) -> None:
    for task in (("--stride", 5, "--micro-batch-size", 2), ("--task", "lambada", "--max-documents", 3)):
        words = ("--load", saved, "--data", saved / "texts.jsonl", *task)
        alone = measure(*words[1:])
        first, second = run_ranks(as_rank, 2, evaluate.main, *words, *layout)
        assert (first.code, second.code, second.out) == (0, 0, "")
        shared = json.loads(first.out)
        assert [shared.pop(name) for name in ("task", "data")] == [alone.pop(name) for name in ("task", "data")]
        assert shared == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "neither"),
        (("--data", "a", "--data-path", "b"), 2, "both"),
        (("--data-path", "b", "--task", "lambada"), 2, "--task lambada"),
        (("--data", "/none.jsonl"), 3, "/none.jsonl"),
        (("--data-path", "/none"), 3, "/none"),
        (("--data", "TEXTS", "--json-key", "body"), 3, "line 1"),
        (("--data", "TEXTS", "--stride", "9"), 2, "--stride"),
        (("--data", "TEXTS", "--stride", "0"), 2, "--stride"),
        (("--data", "TEXTS", "--seq-length", "13"), 2, "at most 12"),
        (("--data", "TEXTS", "--task", "lambada"), 3, "one word"),
    ],
)
def test_wrong_requests_are_told(saved: Path, words: tuple[str, ...], code: int, told: str) -> None:
    named = [str(saved / "texts.jsonl") if word == "TEXTS" else word for word in words]
    outcome = run_tool(evaluate.main, "--load", saved, *named)
    assert outcome.code == code, outcome
    assert outcome.err.startswith("error: ")
    assert told in outcome.err


def test_models_without_a_next_token_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    for kind, params in (("BERT", bert.random_params(BERT)), ("T5", t5.random_params(T5))):
        checkpoint = write_checkpoint(tmp_path / kind, kind, params)
        outcome = run_tool(evaluate.main, "--load", checkpoint, "--data", saved / "texts.jsonl")
        assert outcome.code == 2
        assert f"a {kind}, which" in outcome.err
