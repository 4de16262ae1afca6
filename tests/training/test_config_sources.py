"""--print-config, --use-checkpoint-args and --exit-on-missing-checkpoint through a whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.recipe import TINY, Outcome, Value, run, tree, words

MOCK: dict[str, Value] = TINY | {"mock_data": True}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(outcome: Outcome) -> dict[str, list[str]]:
    """Of each flag in the table, value and origin."""
    assert outcome.code == 0, outcome.err
    found = (re.split(r" {2,}", line.strip()) for line in outcome.out.splitlines() if line.startswith("  --"))
    return {flag: rest for flag, *rest in found}


def test_print_config_needs_nothing_and_writes_nothing(place: Path) -> None:
    table = rows(run(["--print-config", "--model-preset", "llama2-7b", "--num-layers", "3", "--save", "x"]))
    assert table["--num-layers"] == ["3", "command line"]
    assert table["--hidden-size"] == ["4096", "preset llama2-7b"]
    assert table["--tokenizer-type"] == ["GPT2BPETokenizer", "recipe"]
    assert table["--seq-length"] == ["-", "default"]
    assert tree(place) == {}


def test_print_config_names_the_file(place: Path) -> None:
    (place / "ds.json").write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}))
    argv = words(MOCK | {"clip_grad": 2.0, "deepspeed": True, "deepspeed_config": "ds.json", "print_config": True})
    table = rows(run(argv))
    assert table["--clip-grad"] == ["0.5", "ds_config.json"]
    assert table["--zero-stage"] == ["1", "ds_config.json"]
    assert table["--lr"] == ["0.001", "command line"]


def test_a_run_goes_on_with_the_model_of_its_checkpoint() -> None:
    assert run(words(MOCK | {"save": "a", "save_interval": 2, "squared_relu": True})).code == 0
    silent: dict[str, Value] = {
        "num_layers": None,
        "num_attention_heads": None,
        "tokenizer_type": None,
        "vocab_size": None,
    }
    again = MOCK | silent | {"hidden_size": 99, "load": "a", "use_checkpoint_args": True, "train_iters": 4}
    table = rows(run(words(again | {"print_config": True})))
    assert table["--num-layers"] == ["2", "checkpoint a"]
    assert table["--hidden-size"] == ["16", "checkpoint a"]
    assert table["--vocab-size"] == ["100", "checkpoint a"]
    assert table["--lr"] == ["0.001", "command line"]
    outcome = run(words(again))
    assert outcome.code == 0, outcome.err
    assert "--hidden-size: 99 was typed, 16 holds (checkpoint a)" in outcome.out
    assert "iteration        4/       4" in outcome.out


def test_the_first_start_of_a_run_has_only_its_flags() -> None:
    first: dict[str, Value] = {"save": "a", "load": "a", "save_interval": 2}
    refused = run(words(MOCK | first | {"exit_on_missing_checkpoint": True}))
    assert refused.code == 4
    assert "no checkpoint" in refused.err or "no such directory" in refused.err
    assert run(words(MOCK | first | {"use_checkpoint_args": True})).code == 0
    assert run(words(MOCK | first | {"use_checkpoint_args": True, "exit_on_missing_checkpoint": True})).code == 0
