"""What a resumed run refuses, and what it must not disturb."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import RankFailed, run_ranks
from tests.helpers.recipe import TINY, Value, as_rank, run, words
from tests.parity.harness import VOCAB, start

MOCK: dict[str, Value] = TINY | {"mock_data": True, "save_interval": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations of a GPT-2 style model, saved on one rank."""
    out = tmp_path_factory.mktemp("saved")
    assert run(words(MOCK | {"save": str(out), "train_iters": 2})).code == 0
    return out


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"num_attention_heads": 4}, "--num-attention-heads 2"),
        ({"normalization": "RMSNorm"}, "--normalization LayerNorm"),
        ({"disable_bias_linear": True}, "--disable-bias-linear False"),
        ({"use_rotary_position_embeddings": True}, "--position-embedding-type learned_absolute"),
        ({"untie_embeddings_and_output_weights": True}, "--untie-embeddings-and-output-weights False"),
        ({"num_layers": 1}, "--num-layers 2"),
        ({"norm_epsilon": 1e-6}, "--norm-epsilon 1e-05"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved: Path, flags: dict[str, Value], flag: str) -> None:
    """Even where every tensor that the new model wants is there in its shape."""
    outcome = run(words(MOCK | {"load": str(saved)} | flags))
    assert outcome.code == 4
    assert f"found:    {flag}" in outcome.err or f"; {flag}" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("flags", [{"hidden_dropout": 0}, {"num_key_value_heads": 2}, {"ffn_hidden_size": 64}])
def test_other_words_for_the_same_model_are_not(saved: Path, flags: dict[str, Value]) -> None:
    outcome = run(words(MOCK | {"load": str(saved), "train_iters": 3} | flags))
    assert outcome.code == 0, outcome.err
    assert " iteration        3/" in outcome.out


def on_a_node_of_its_own(argv: list[str], full: str, empty: str) -> str:
    """A rank whose mount of the checkpoint directory may be missing."""
    where = full if os.environ["RANK"] == "0" else empty
    return as_rank([*argv, "--save", where, "--load", where])


def test_ranks_that_see_different_checkpoints_refuse_to_start(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as left:
        run_ranks(on_a_node_of_its_own, 2, words(MOCK | {"train_iters": 4}), str(saved), str(tmp_path))
    assert left.value.exit_code == 4


def test_an_evaluation_leaves_the_metrics_of_the_training_alone(tmp_path: Path) -> None:
    flags = MOCK | {"train_iters": 4, "save": str(tmp_path / "ck"), "metrics_file": str(tmp_path / "m.jsonl")}
    assert run(words(flags)).code == 0
    before = (tmp_path / "m.jsonl").read_text()
    flags |= {"skip_train": True, "load": str(tmp_path / "ck"), "ckpt_step": 2, "save": None, "save_interval": None}
    assert run(words(flags)).code == 0
    assert (tmp_path / "m.jsonl").read_text().startswith(before)


def test_train_samples_hold_when_the_batch_changes(tmp_path: Path) -> None:
    flags = MOCK | {"train_iters": None, "train_samples": 16, "save": str(tmp_path), "load": str(tmp_path)}
    assert run(words(flags | {"exit_interval": 2})).code == 0
    outcome = run(words(flags | {"global_batch_size": 2, "metrics_file": str(tmp_path / "m.jsonl")}))
    assert outcome.code == 0, outcome.err
    steps = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["consumed_samples"] for row in steps if "lm loss" in row] == [10, 12, 14, 16]


def test_zeros_in_padding_are_not_counted(tmp_path: Path) -> None:
    """With 101 tokens, 27 rows of 16 are padding, or 155 when padded to 256."""
    counts = []
    for multiple in (128, 256):
        name = str(tmp_path / f"{multiple}.jsonl")
        flags = MOCK | {"log_num_zeros_in_grad": True, "make_vocab_size_divisible_by": multiple, "metrics_file": name}
        assert run(words(flags | {"train_iters": 1, "save_interval": None})).code == 0
        counts.append(json.loads(Path(name).read_text().splitlines()[0])["num_zeros"])
    assert counts[0] == counts[1] < 27 * 16


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), None),
        (("model", "hidden_size"), None),
        (("model", "something_new"), 1),
        (("progress", "consumed_samples"), "x"),
        (("progress", "consumed_samples"), -5),
        (("progress",), {}),
    ],
)
def test_a_damaged_state_is_told(saved: Path, tmp_path: Path, path: tuple[str, ...], value: object) -> None:
    shutil.copytree(saved, tmp_path / "ck")
    index = tmp_path / "ck/iter_0000002/index.json"
    content = json.loads(index.read_text())
    *way, last = path
    place = content["state"]
    for key in way:
        place = place[key]
    place[last] = value
    index.write_text(json.dumps(content))
    outcome = run(words(MOCK | {"load": str(tmp_path / "ck"), "train_iters": 3}))
    assert outcome.code == 4
    assert "index.json" in outcome.err
    assert "Traceback" not in outcome.err


def test_each_validation_reads_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    """Three validations of two global batches of four samples, by the checkpoint's own word."""
    flags = MOCK | {"train_iters": 6, "eval_interval": 2, "eval_iters": 2, "save": str(tmp_path), "save_interval": 6}
    assert run(words(flags)).code == 0
    state = json.loads((tmp_path / "iter_0000006/index.json").read_text())["state"]
    assert state["progress"]["consumed_valid_samples"] == 3 * 2 * 4
    assert state["progress"]["consumed_samples"] == 6 * 4


def loss_scale(argv: list[str]) -> float:
    return start(argv).normaliser


@pytest.mark.parametrize("batch", [2, 6, 10, 14])
def test_the_scale_of_the_backward_is_exact_in_bf16(batch: int) -> None:
    """1 / positions itself would be rounded, and with it every gradient and the norm."""
    flags = MOCK | {"global_batch_size": batch, "bf16": True, "save_interval": None, "vocab_size": VOCAB - 1}
    (scale,) = run_ranks(loss_scale, 1, words(flags))
    assert torch.tensor(scale).bfloat16().double().item() == scale
    assert 0.5 < scale * batch * 8 <= 1.0
