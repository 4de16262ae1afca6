"""The command line: what it refuses, what it says, and that a failure leaves nothing behind."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from megatron_ds.checkpoint.load import find
from megatron_ds.convert import hub, llama
from megatron_ds.convert.family import Family, Fields
from megatron_ds.convert.rules import Rule, same
from megatron_ds.model.config import TransformerConfig
from tests.convert import published
from tests.convert.megatron_files import VOCAB, gpt, gpt_chunk, options, write_classic
from tools import convert_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.save("llama", tmp_path_factory.mktemp("published"))


def convert(source: Path, target: Path, *more: str, kind: str = "GPT", loader: str = "hf") -> int:
    where = ["--load-dir", str(source), "--save-dir", str(target)]
    return convert_checkpoint.main(["--model-type", kind, "--loader", loader, "--saver", "megatron_ds", *where, *more])


def test_nothing_is_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("precious")
    assert convert(source, tmp_path) == 2
    assert "--save-dir" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert convert(source, tmp_path / "empty", "--no-check") == 0


def _norms_swapped(config: TransformerConfig) -> list[Rule]:
    """The mistake of a converter: two tensors of one shape under each other's names."""
    names = {"pre_mlp_layernorm": "input_layernorm", "input_layernorm": "post_attention_layernorm"}
    rules = []
    for rule in llama.LLAMA.rules(config):
        _, layer, *rest = rule.ours.split(".")
        wrong = layer == "1" and rest and names.get(rest[0])
        rules.append(same(rule.ours, f"model.layers.1.{wrong}.weight") if wrong else rule)
    return rules


def test_a_wrong_conversion_is_found_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = dataclasses.replace(llama.LLAMA, rules=_norms_swapped)

    def family_of(fields: Fields) -> Family:
        return wrong

    monkeypatch.setattr(hub, "family_of", family_of)
    assert convert(source, tmp_path / "ours") == 4
    said = capsys.readouterr()
    assert "at most 0.0001" in said.err
    assert float(said.out.splitlines()[0].split()[-1]) > 1e-3
    assert not list(tmp_path.iterdir())


def test_the_kind_of_model_must_be_the_one_that_was_asked_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "ours", kind="T5") == 2
    assert "--model-type T5" in capsys.readouterr().err


def test_without_transformers_the_message_names_the_way_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert convert(source, tmp_path / "ours") == 2
    assert "--no-check" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert convert(source, tmp_path / "ours", "--no-check") == 0
    assert "not checked" in capsys.readouterr().out


def test_flags_of_megatrons_tool_are_accepted_and_explained(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "4", "--max-queue-size", "50"]
    assert convert(source, tmp_path / "ours", *sizes, "--no-checking", "--no-check") == 0
    said = capsys.readouterr().out
    assert said.count("has no effect") == 3
    assert "our checkpoints fit every layout" in said


def test_a_checkpoint_of_megatron_is_compared_through_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gpt()
    write_classic(
        tmp_path / "old", options(), lambda t, p: {"model": gpt_chunk(whole, range(2 * p, 2 * p + 2), t, 2)}, 2, 2
    )
    rows = ["--true-vocab-size", str(VOCAB)]
    assert convert(tmp_path / "old", tmp_path / "ours", *rows, loader="megatron") == 0
    assert "largest logit difference from transformers' GPT2LMHeadModel" in capsys.readouterr().out
    assert find(tmp_path / "ours").iteration == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "ours"]


def test_a_checkpoint_of_megatron_without_a_counterpart_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gpt(bias=False)
    args = options(add_bias_linear=False, tensor_model_parallel_size=1)
    write_classic(tmp_path / "old", args, lambda t, p: {"model": gpt_chunk(whole, range(4), t, 1)}, 1, 1)
    assert convert(tmp_path / "old", tmp_path / "ours", "--true-vocab-size", str(VOCAB), loader="megatron") == 0
    assert "not checked: no class of Hugging Face computes this model" in capsys.readouterr().out


@pytest.mark.parametrize("loader", ["hf", "megatron", "megatron_ds"])
def test_a_source_that_is_not_there(loader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(tmp_path / "gone", tmp_path / "ours", loader=loader) == 4
    assert "gone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
