"""Text from a checkpoint: the likeliest tokens are those of the oracle, drawn ones have the probabilities by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import build_tokenizer
from megatron_ds.errors import DataError
from megatron_ds.training.inference import load_trained
from megatron_ds.training.sampling import (
    Ids,
    SamplingConfig,
    answer_prompts,
    choose,
    continue_prompts,
    distribution,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.recipe import environment
from tests.reference import bert, gpt, t5
from tests.tools.written import BERT, GPT, T5, VOCAB, as_rank, run_tool, write_checkpoint
from tools import generate

ROOT = Path(__file__).resolve().parents[2]
END, WINDOW = VOCAB - 1, 8
PROMPTS = [[5, 17, 3], [40], [1, 2, 3, 4, 5, 6, 7]]
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT of weights large enough to prefer some tokens, whose texts are numbers."""
    return write_checkpoint(tmp_path_factory.mktemp("gpt"), "GPT", gpt.random_params(GPT, std=0.4), seq_length=WINDOW)


@pytest.fixture(scope="module")
def saved_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose texts are words a0, a1 ... of a WordPiece vocabulary, with four sentinels."""
    out = tmp_path_factory.mktemp("t5")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"a{i}" for i in range(VOCAB - 5 - 2 - 4))]
    (out / "vocab.txt").write_text("\n".join(words) + "\n")
    return write_checkpoint(out, "T5", t5.random_params(T5, std=0.4), tokenizer=wordpiece(out))


def wordpiece(folder: Path) -> TokenizerConfig:
    return TokenizerConfig(
        tokenizer_type="BertWordPieceLowerCase", vocab_file=str(folder / "vocab.txt"), vocab_extra_ids=4
    )


def likeliest(prompt: list[int], count: int) -> list[int]:
    """A loop over the oracle."""
    params, ids = gpt.random_params(GPT, std=0.4), list(prompt)
    for _ in range(count):
        token = int(gpt.forward(params, GPT, torch.tensor([ids[-WINDOW:]]))[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_the_likeliest_tokens_are_the_oracles(saved: Path) -> None:
    found = continue_prompts(load_trained(str(saved)), PROMPTS, GREEDY, Ids(END, VOCAB))
    assert found == [likeliest(prompt, 6) for prompt in PROMPTS]
    assert len(set(map(tuple, found))) == 3


def test_the_end_stops_its_own_row_only(saved: Path) -> None:
    trained = load_trained(str(saved))
    free = continue_prompts(trained, PROMPTS, GREEDY, Ids(END, VOCAB))
    end = next(token for token in free[1] if token not in free[0])
    stopped = continue_prompts(trained, PROMPTS, GREEDY, Ids(end, VOCAB))
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]
    assert len(stopped[1]) < 6 == len(stopped[0])


def test_ids_without_a_text_are_never_chosen(saved: Path) -> None:
    (free,) = continue_prompts(load_trained(str(saved)), PROMPTS[:1], GREEDY, Ids(END, VOCAB))
    assert max(free) >= 20
    (found,) = continue_prompts(load_trained(str(saved)), PROMPTS[:1], GREEDY, Ids(END, 20))
    assert len(found) == 6
    assert max(found) < 20


def test_t5_answers_as_the_oracle(saved_t5: Path) -> None:
    params, expected = t5.random_params(T5, std=0.4), []
    for prompt in PROMPTS:
        answer = [7]
        for _ in range(6):
            real = torch.ones(1, len(prompt), dtype=torch.bool)
            logits = t5.forward(params, T5, torch.tensor([prompt]), torch.tensor([answer]), real)
            answer.append(int(logits[0, -1].argmax()))
        expected.append(answer[1:])
    end = next(token for token in range(VOCAB) if all(token not in row for row in expected))
    assert answer_prompts(load_trained(str(saved_t5)), PROMPTS, GREEDY, Ids(end, VOCAB), start=7) == expected


PROBABILITIES = [0.1, 0.5, 0.15, 0.25]
"""Likeliest first: tokens 1, 3, 2, 0."""


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {1: 0.5, 3: 0.25, 2: 0.15, 0: 0.1}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 9}, {1: 0.5, 3: 0.25, 2: 0.15, 0: 0.1}),
        ({"top_p": 0.3}, {1: 1.0}),
        ({"top_p": 0.6}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 0.8}, {1: 5 / 9, 3: 2.5 / 9, 2: 1.5 / 9}),
        # Of the three likeliest 0.5/0.9 is less than 0.7, with 0.25/0.9 it is more.
        ({"top_k": 3, "top_p": 0.7}, {1: 2 / 3, 3: 1 / 3}),
        ({"temperature": 0.5, "top_k": 2}, {1: 0.8, 3: 0.2}),
        # Squared, 0.25 of 0.345 is 0.72: enough for 0.7. Before the temperature two tokens were needed.
        ({"temperature": 0.5, "top_p": 0.7}, {1: 1.0}),
    ],
)
def test_distributions_by_hand(asked: dict[str, float], expected: dict[int, float]) -> None:
    logits = torch.tensor(PROBABILITIES).log() + 3
    config = SamplingConfig(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | asked)  # type: ignore[arg-type]
    ids, probabilities = distribution(logits, config)
    assert dict(zip(ids.tolist(), probabilities.tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits, generator = torch.tensor(PROBABILITIES).log(), torch.Generator().manual_seed(0)
    config = SamplingConfig(temperature=1.0, top_k=0)
    counts = Counter(choose(logits, config, generator) for _ in range(4000))
    for token, probability in enumerate(PROBABILITIES):
        assert abs(counts[token] / 4000 - probability) < 5 * math.sqrt(probability * (1 - probability) / 4000)


def test_a_prompt_draws_the_same_in_any_company(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("5 17 3\n\n40\n5 17 3\n")
    common = ("--load", saved, "--prompts", tmp_path / "prompts.txt", "--temperature", 2, "--max-new-tokens", 8)
    printed = [run_tool(generate.main, *common, "--batch-size", size).out for size in (1, 2, 8)]
    assert printed[0] == printed[1] == printed[2]
    rows = [json.loads(line) for line in printed[0].splitlines()]
    assert [row["prompt"] for row in rows] == ["5 17 3", "40", "5 17 3"]
    assert rows[0]["tokens"] != rows[2]["tokens"], "the third prompt has a seed of its own"
    assert rows[0]["text"] == " ".join(map(str, [5, 17, 3, *rows[0]["tokens"]]))
    alone = run_tool(generate.main, *common[:2], "--prompt", "5 17 3", *common[4:], "--seed", 1236)
    assert alone.out == rows[2]["text"] + "\n"


@pytest.mark.parametrize("flags", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_any_layout_writes_the_same(saved: Path, saved_t5: Path, tmp_path: Path, flags: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "5 17 3"}\n{"text": "40"}\n')
    for checkpoint, prompts in ((saved, ("--prompts", tmp_path / "p.jsonl")), (saved_t5, ("--prompt", "a5 a6"))):
        words = ("--load", checkpoint, *prompts, "--max-new-tokens", 5, "--temperature", 1.5)
        alone = run_tool(generate.main, *words)
        assert alone.code == 0, alone.err
        first, second = run_ranks(as_rank, 2, generate.main, *words, flags, 2)
        assert first.out == alone.out != ""
        assert second.out == ""


def test_sentinels_are_filled(saved_t5: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(wordpiece(saved_t5))
    first = VOCAB - 4
    assert generate.encoder_ids("a0 <extra_id_0> a2<extra_id_1>", tokenizer) == [5, first, 7, first + 1]
    answer = [first, 6, 8, first + 1, 9]
    assert generate.filled("a0 <extra_id_0> a2 <extra_id_1>.", answer, tokenizer) == "a0 a1 a3 a2 a4."
    assert generate.filled("a0 <extra_id_3>.", answer, tokenizer) == "a0 ."
    assert generate.filled("a0", [5, 6], tokenizer) == "a0 a1"
    with pytest.raises(DataError, match="extra_id_4"):
        generate.encoder_ids("<extra_id_4>", tokenizer)
    words = ("--load", saved_t5, "--prompt", "a0 <extra_id_0> a2", "--temperature", 0, "--max-new-tokens", 4)
    outcome = run_tool(generate.main, *words, "--output", tmp_path / "out.jsonl")
    assert (outcome.code, outcome.out) == (0, "")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["text"].startswith("a0 ")
    assert row["text"].endswith(" a2")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--prompt", "99 5"), 3, "token id 99"),
        (("--prompt", "five"), 3, "NullTokenizer"),
        (("--temperature", "-1"), 2, "--temperature"),
        (("--temperature", "nan"), 2, "--temperature"),
        (("--top-k", "-2"), 2, "--top-k"),
        (("--top-p", "0"), 2, "--top-p"),
        (("--top-p", "1.5"), 2, "--top-p"),
        (("--batch-size", "0"), 2, "--batch-size"),
        (("--prompts", "/none.txt"), 3, "/none.txt"),
        (("--output", "/none/out.jsonl"), 2, "/none"),
        (("--ckpt-step", "9"), 4, "one of 7"),
    ],
)
def test_requests_that_mean_nothing(saved: Path, words: tuple[str, ...], code: int, told: str) -> None:
    outcome = run_tool(generate.main, "--load", saved, *words)
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert told in outcome.err


def test_files_without_prompts_are_told(saved: Path, tmp_path: Path) -> None:
    for name, text, told in (
        ("a.txt", "\n\n", "no prompt"),
        ("b.jsonl", '{"x": 1}', "line 1"),
        ("c.jsonl", "5", "prompt"),
    ):
        (tmp_path / name).write_text(text)
        outcome = run_tool(generate.main, "--load", saved, "--prompts", tmp_path / name)
        assert outcome.code == 3
        assert told in outcome.err


def test_bert_is_refused_by_name(tmp_path: Path) -> None:
    outcome = run_tool(generate.main, "--load", write_checkpoint(tmp_path, "BERT", bert.random_params(BERT)))
    assert outcome.code == 2
    assert "a BERT, which writes no text" in outcome.err


def test_the_tool_by_its_path(saved: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/generate.py"), "--load", str(saved), "--temperature", "0"]
    done = subprocess.run([*command, "--prompt", "5 17 3"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(map(str, [5, 17, 3, *likeliest([5, 17, 3], 6)])))
