"""tools/forward.py says what transformers says, alone and on any layout, and refuses what it cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.reference import bert, gpt, t5
from tests.tools.written import BERT, GPT, POSITIONS, T5, VOCAB, as_rank, run_tool, write_checkpoint
from tools import forward

ORACLES: dict[str, tuple[Any, Any]] = {"GPT": (gpt, GPT), "BERT": (bert, BERT), "T5": (t5, T5)}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each model."""
    out = tmp_path_factory.mktemp("saved")
    return {
        kind: write_checkpoint(out / kind, kind, oracle.random_params(c, std=0.3))
        for kind, (oracle, c) in ORACLES.items()
    }


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Three rows, one of them padded, and everything that transformers would take."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (3, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.randint(VOCAB, (3, 5 if kind == "T5" else 9), generator=draw)
    labels[0, 2] = labels[1, 4:] = -100
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if kind == "T5":
        given["decoder_attention_mask"] = torch.ones_like(labels)
        given["decoder_attention_mask"][1, 4:] = 0
    if kind == "BERT":
        given["token_type_ids"] = (torch.arange(9) > torch.tensor([[3], [2], [5]])).long()
        given["next_sentence_label"] = torch.tensor([1, 0, 1])
    return given


def run(tmp_path: Path, checkpoint: Path, given: dict[str, Any], *flags: object) -> dict[str, np.ndarray]:
    out = tmp_path / "out.npz"
    np.savez(tmp_path / "in.npz", **{name: np.asarray(values) for name, values in given.items()})
    files = ("--input", tmp_path / "in.npz", "--output", out)
    outcome = run_tool(forward.main, "--load", checkpoint, *files, *flags)
    assert outcome.code == 0, outcome.err
    return dict(np.load(out))


@pytest.mark.parametrize("kind", ["GPT", "BERT", "T5"])
def test_transformers_says_the_same(saved: dict[str, Path], tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    from tests.parity import published

    build: Any = {"GPT": published.gpt2, "BERT": published.bert, "T5": published.t5}[kind]
    oracle, config = ORACLES[kind]
    given = inputs(kind)
    model = build(config, oracle.random_params(config, std=0.3))
    model.config.decoder_start_token_id = 0  # what published models of T5 say; the class itself says nothing
    with torch.no_grad():
        theirs = model(**given)
    ours = run(tmp_path, saved[kind], given, "--micro-batch-size", 2)
    real = given["decoder_attention_mask" if kind == "T5" else "attention_mask"].bool().numpy()
    logits = theirs["prediction_logits"] if kind == "BERT" else theirs["logits"]
    np.testing.assert_allclose(ours["logits"][real], logits.numpy()[real], atol=TOLERANCE)
    assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), abs=TOLERANCE)
    assert ours["logits"].dtype == ours["loss"].dtype == np.float32
    if kind == "BERT":
        order = theirs["seq_relationship_logits"].numpy()
        np.testing.assert_allclose(ours["seq_relationship_logits"], order, atol=TOLERANCE)
        np.testing.assert_array_equal(ours["prediction_logits"], ours["logits"])
        assert ours["lm_loss"] + ours["sop_loss"] == pytest.approx(ours["loss"])


@pytest.mark.parametrize(
    ("kind", "tp", "pp"),
    [*((kind, *layout) for kind in ORACLES for layout in ((2, 1), (1, 2))), ("T5", 1, 3), ("GPT", 2, 2)],
)
def test_any_layout(saved: dict[str, Path], tmp_path: Path, kind: str, tp: int, pp: int) -> None:
    alone = run(tmp_path, saved[kind], inputs(kind))
    out = tmp_path / "shared.npz"
    words = ("--load", saved[kind], "--input", tmp_path / "in.npz", "--output", out, "--micro-batch-size", 2)
    layout = ("--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp)
    outcomes = run_ranks(as_rank, tp * pp, forward.main, *words, *layout)
    assert [outcome.code for outcome in outcomes] == [0] * (tp * pp), outcomes
    shared = dict(np.load(out))
    assert shared.keys() == alone.keys()
    assert shared["logits"].shape[-1] == VOCAB
    for name, values in alone.items():
        np.testing.assert_allclose(shared[name], values, atol=TOLERANCE, err_msg=name)


def test_padding_on_the_left_equals_the_tokens_alone(saved: dict[str, Path], tmp_path: Path) -> None:
    ids = torch.tensor([[5, 17, 3, 44, 2]])
    alone = run(tmp_path, saved["GPT"], {"input_ids": ids})["logits"]
    left = {
        "input_ids": torch.cat([torch.tensor([[9, 9]]), ids], 1),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2, 3, 4]]),
    }
    np.testing.assert_allclose(run(tmp_path, saved["GPT"], left)["logits"][:, 2:], alone, atol=TOLERANCE)


def test_t5_starts_the_decoder_as_told(saved: dict[str, Path], tmp_path: Path) -> None:
    ids, labels = torch.tensor([[5, 17, 3]]), torch.tensor([[4, -100, 6]])
    told = run(tmp_path, saved["T5"], {"input_ids": ids, "labels": labels}, "--decoder-start-token-id", 8)
    by_hand = {"input_ids": ids, "decoder_input_ids": torch.tensor([[8, 4, 0]])}
    np.testing.assert_array_equal(told["logits"], run(tmp_path, saved["T5"], by_hand)["logits"])


def test_precision_is_the_checkpoints_unless_told(tmp_path: Path) -> None:
    params = gpt.random_params(GPT, std=0.3, dtype=torch.bfloat16)
    checkpoint = write_checkpoint(tmp_path / "bf16", "GPT", params)
    ids = torch.tensor([[5, 17, 3, 44]])
    exact = gpt.forward({name: value.float() for name, value in params.items()}, GPT, ids).numpy()
    np.testing.assert_allclose(run(tmp_path, checkpoint, {"input_ids": ids}, "--fp32")["logits"], exact, atol=TOLERANCE)
    rounded = run(tmp_path, checkpoint, {"input_ids": ids})["logits"]
    assert 1e-3 < np.abs(rounded - exact).max() < 0.5


IDS = np.ones((2, 4), np.int64)
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("GPT", {"ids": IDS}, "ids"),
    ("GPT", {"labels": IDS}, "input_ids"),
    ("GPT", {"input_ids": IDS * VOCAB}, f"value {VOCAB}"),
    ("GPT", {"input_ids": -IDS}, "value -1"),
    ("GPT", {"input_ids": IDS[0]}, "shape [4]"),
    ("GPT", {"input_ids": IDS.astype(float)}, "float64"),
    ("GPT", {"input_ids": np.ones((1, POSITIONS + 1), np.int64)}, f"{POSITIONS + 1} positions"),
    ("GPT", {"input_ids": IDS, "labels": IDS[:, 1:]}, "labels"),
    ("GPT", {"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids"),
    ("GPT", {"input_ids": IDS, "attention_mask": np.array([[1, 0, 1, 1]] * 2)}, "between"),
    ("GPT", {"input_ids": IDS, "attention_mask": np.array([[0, 1, 1, 1]] * 2), "labels": IDS}, "-100"),
    ("BERT", {"input_ids": IDS, "next_sentence_label": np.array([0, 2])}, "value 2"),
    ("BERT", {"input_ids": IDS, "next_sentence_label": np.array([0])}, "next_sentence_label"),
    ("T5", {"input_ids": IDS}, "decoder_input_ids"),
    ("T5", {"input_ids": IDS, "labels": IDS[:1]}, "labels"),
    ("T5", {"input_ids": IDS, "labels": IDS, "decoder_attention_mask": np.array([[0, 1, 1, 1]] * 2)}, "right"),
    ("T5", {"input_ids": IDS, "labels": IDS, "decoder_attention_mask": np.array([[1, 1, 1, 0]] * 2)}, "-100"),
]


@pytest.mark.parametrize(("kind", "given", "told"), WRONG)
def test_what_cannot_be_read_is_named(
    saved: dict[str, Path], tmp_path: Path, kind: str, given: dict[str, Any], told: str
) -> None:
    np.savez(tmp_path / "in.npz", **given)
    files = ("--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    outcome = run_tool(forward.main, "--load", saved[kind], *files)
    assert outcome.code == 3
    assert outcome.err.startswith("error: --input")
    assert told in outcome.err
    assert not (tmp_path / "out.npz").exists()


def test_wrong_files_and_layouts_are_told(saved: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=IDS)
    (tmp_path / "text.npz").write_text("no zip")
    good = {"--load": saved["GPT"], "--input": tmp_path / "in.npz", "--output": tmp_path / "out.npz"}
    for change, code, told in (
        ({"--input": tmp_path / "none.npz"}, 3, "No such file"),
        ({"--input": tmp_path / "text.npz"}, 3, "no .npz"),
        ({"--output": tmp_path / "none/out.npz"}, 2, "--output"),
        ({"--load": tmp_path}, 4, "no checkpoint"),
        ({"--tensor-model-parallel-size": 2}, 2, "torchrun --nproc-per-node 2"),
        ({"--pipeline-model-parallel-size": 4}, 2, "3 layers"),
        ({"--tensor-model-parallel-size": 3}, 2, "4 attention heads"),
        ({"--micro-batch-size": 0}, 2, "--micro-batch-size"),
    ):
        words = [word for pair in {**good, **change}.items() for word in pair]
        outcome = run_tool(forward.main, *words)
        assert outcome.code == code, (change, outcome)
        assert told in outcome.err, (change, outcome)
        assert "Traceback" not in outcome.err
