"""A user's mistake ends in one message that names it and a way out, in the exit code of its kind, and in no file."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_ds.data.sidecar import Sidecar, sidecar_path
from tests.helpers.recipe import TINY, VOCAB, Outcome, Value, environment, run, tree, words, write_tokens
from tests.house.source import ROOT

CONFIG, DATA, CHECKPOINT = 2, 3, 4

# A run that, if nothing stopped it, would write everywhere: index cache, checkpoints, metrics and TensorBoard events.
FLAGS: dict[str, Value] = TINY | {
    "data_path": "data/text",
    "split": "8,1,1",
    "save": "out/checkpoints",
    "save_interval": 2,
    "metrics_file": "out/metrics.jsonl",
    "tensorboard_dir": "out/tensorboard",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with data in it."""
    monkeypatch.chdir(tmp_path)
    write_tokens(tmp_path / "data/text")
    return tmp_path


def refused(place: Path, code: int, flags: dict[str, Value], **variables: str) -> str:
    """The message of a run that must be refused: alone on stderr, whole, and without consequences."""
    before = tree(place)
    outcome = run(words(FLAGS | flags), **variables)
    assert outcome.code == code, outcome
    check_message(outcome)
    after = tree(place)
    assert after == before, f"wrote {sorted(after.keys() - before.keys())}"
    return outcome.err


def check_message(outcome: Outcome) -> None:
    """Every error says what was found and how to go on."""
    assert "Traceback" not in outcome.err + outcome.out
    before, *errors = re.split("^error: ", outcome.err, flags=re.MULTILINE)
    assert all(line.startswith("WARNING: ") for line in before.splitlines())
    assert errors
    for error in errors:
        subject, *lines = error.splitlines()
        labels = [line.split()[0] for line in lines if re.match(r"    \w+:", line)]
        assert subject and labels[:1] == ["found:"] and labels[-1:] == ["fix:"], outcome.err


def test_the_same_run_without_a_mistake_writes_everything(place: Path) -> None:
    outcome = run(words(FLAGS))
    assert outcome.code == 0, outcome.err
    files = tree(place)
    for part in ("data/cache/GPTDataset_indices/", "out/checkpoints/iter_0000002/", "out/tensorboard/events"):
        assert any(name.startswith(part) for name in files), part
    assert "out/metrics.jsonl" in files


class Case(NamedTuple):
    """A mistake in the flags, on `ranks` ranks, and what the message must say."""

    flags: dict[str, Value]
    says: tuple[str, ...]
    ranks: int = 1


CONFIG_CASES = {
    "world size": Case({"tensor_model_parallel_size": 2}, ("--tensor-model-parallel-size", "with 3 ranks"), 3),
    "heads": Case({"tensor_model_parallel_size": 4}, ("--num-attention-heads", "2 heads", "-parallel-size 4"), 4),
    "layers": Case({"pipeline_model_parallel_size": 2, "num_layers": 3}, ("--num-layers", "3 layers", "size 2"), 2),
    "batch": Case(
        {"global_batch_size": 6}, ("--global-batch-size", "6", "micro-batch-size 2 on 2", "multiple of 4"), 2
    ),
    "misspelt": Case({"hiden_size": 3}, ("--hiden-size", "--hidden-size")),
    "both halves": Case({"fp16": True, "bf16": True}, ("--fp16 and --bf16", "one of them")),
    "missing flags": Case({"lr": None, "hidden_size": None}, ("--hidden-size --lr", "not given", "--lr 3e-4")),
    "wrong kind": Case({"num_layers": "many"}, ("--num-layers", "'many'")),
    "wrong choice": Case({"lr_decay_style": "cosin"}, ("--lr-decay-style", "'cosin'", "--lr-decay-style cosine")),
    "no value": Case({"seed": True}, ("--seed", "expected one argument")),
    "absent feature": Case({"kill_switch_path": "x"}, ("--kill-switch-path", "not supported yet")),
    "another model's flag": Case({"decoder_seq_length": 8}, ("--decoder-seq-length", "a GPT model", "T5")),
    "another recipe's preset": Case(
        {"model_preset": "bert-base"}, ("--model-preset bert-base", "pretrain_bert.py --model-preset bert-base")
    ),
    "unknown preset": Case({"model_preset": "gpt2"}, ("--model-preset", "gpt2, which names no model", "gpt2-")),
    "two activations": Case({"relu": True, "swiglu": True}, ("--swiglu and --relu", "one activation")),
    "masks in the ring": Case(
        {"context_parallel_size": 2, "reset_attention_mask": True},
        ("--context-parallel-size", "--reset-attention-mask", "--ds-sequence-parallel-size 2"),
        2,
    ),
    "no checkpoint to take from": Case({"use_checkpoint_args": True}, ("--use-checkpoint-args", "--load DIR")),
    "negative": Case({"num_workers": -1}, ("--num-workers", "-1", "at least 0")),
    "not a number": Case({"clip_grad": "nan"}, ("--clip-grad", "nan")),
    "seed": Case({"seed": 2**32}, ("--seed", "4294967295")),
    "beta": Case({"adam_beta2": 1.0}, ("--adam-beta2", "less than 1")),
    "too few samples": Case({"train_iters": None, "train_samples": 3}, ("--train-samples", "--train-samples 4")),
    "no data": Case({"data_path": None}, ("--data-path", "--mock-data")),
    "only validation data": Case({"data_path": None, "valid_data_path": "data/text"}, ("--train-data-path",)),
    "split": Case({"split": "most"}, ("--split", "'most'", "969,30,1")),
    "unused": Case({"ckpt_step": 5}, ("--ckpt-step", "--load")),
    "world size flag": Case({"world_size": 8}, ("--world-size", "the launcher started 1")),
    "tokenizer flags": Case({"tokenizer_type": "GPT2BPETokenizer"}, ("--vocab-file", "GPT2BPETokenizer")),
    "tokenizer type": Case({"tokenizer_type": "GPT3BPE"}, ("--tokenizer-type", "GPT2BPETokenizer")),
    "device": Case({"device": "cuda"}, ("--device", "no GPU", "--device auto")),
    "save": Case({"save": "data/text.bin/x"}, ("--save", "data/text.bin is not a directory")),
}


@pytest.mark.parametrize("name", CONFIG_CASES)
def test_configuration(name: str, place: Path) -> None:
    flags, says, ranks = CONFIG_CASES[name]
    message = refused(place, CONFIG, flags, RANK="0", WORLD_SIZE=str(ranks))
    for part in says:
        assert part in message


def test_several_mistakes_are_told_at_once(place: Path) -> None:
    flags: dict[str, Value] = {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_attention_heads": 3, "num_layers": 5,
        "global_batch_size": 3, "fp16": True, "bf16": True, "split": "0,0,0", "lr_warmup_iters": 9,
        "tokenizer_type": "GPT2BPETokenizer", "vocab_file": "missing.json", "load": "missing",
    }  # fmt: skip
    message = refused(place, CONFIG, flags, RANK="0", WORLD_SIZE="4")
    subjects = [line.removeprefix("error: ") for line in message.splitlines() if line.startswith("error: ")]
    assert sorted(set(subjects)) == sorted(
        [
            "--num-attention-heads",
            "--num-layers",
            "--global-batch-size",
            "--fp16 and --bf16",
            "--split",
            "--lr-warmup-iters",
        ]
    )


def rewrite(change: Callable[[bytes], bytes], name: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(change((place / name).read_bytes()))


def with_sidecar(place: Path) -> None:
    write_tokens(place / "data/text", largest=300)
    sidecar = Sidecar(
        tokenizer_type="NullTokenizer", tokenizer_fingerprint="x", vocab_size=400, eod=400, append_eod=False,
        max_token_id=300, documents=20, sequences=20, tokens=1000,
    )  # fmt: skip
    sidecar_path("data/text").write_text(sidecar.to_json())


DATA_CASES: dict[str, tuple[dict[str, Value], Callable[[Path], object], tuple[str, ...]]] = {
    "missing": ({"data_path": "data/txt"}, lambda place: None, ("data/txt", "txt.idx", "txt.bin", "prefix")),
    "with its ending": ({"data_path": "data/text.idx"}, lambda place: None, ("data/text.idx", "leave the ending off")),
    "missing half": ({}, lambda place: (place / "data/text.bin").unlink(), ("data/text.bin", "text.idx is there")),
    "wrong magic": ({}, rewrite(lambda old: b"GARBAGE!!" + old[9:], "data/text.idx"), ("data/text.idx", "magic 47 41")),
    "empty index": ({}, rewrite(lambda old: b"", "data/text.idx"), ("data/text.idx", "magic", "empty")),
    "truncated": ({}, rewrite(lambda old: old[:-10], "data/text.bin"), ("text.bin", "1990 bytes", "2000 bytes")),
    "id too large": (
        {}, lambda place: write_tokens(place / "data/text", largest=300),
        ("data/text.bin", "token id 300 in document 19", f"0 to {VOCAB - 1}"),
    ),
    "id too large, by the sidecar": ({}, with_sidecar, ("data/text.bin", "token id 300 in document 19", "0 to 100")),
    "empty validation": ({"split": "100,1,1"}, lambda place: None, ("--split '100,1,1'", "validation 0")),
    "empty training": ({"split": "1,100,1"}, lambda place: None, ("--split '1,100,1'", "training 0")),
    "tokenizer file": (
        {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "vocab.json", "merge_file": "merges.txt"},
        lambda place: None, ("--vocab-file vocab.json", "no such file"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA_CASES)
def test_data(name: str, place: Path) -> None:
    flags, damage, says = DATA_CASES[name]
    damage(place)
    message = refused(place, DATA, flags)
    for part in says:
        assert part in message


def test_load_of_nothing(place: Path) -> None:
    (place / "empty").mkdir()
    message = refused(place, CHECKPOINT, {"load": "empty"})
    assert "error: empty\n" in message
    assert "no checkpoint" in message
    assert "iter_0000100" in message
    assert "no such directory" in refused(place, CHECKPOINT, {"load": "nowhere"})


def test_load_of_another_model_and_another_step(place: Path) -> None:
    assert run(words(FLAGS | {"save": "saved"})).code == 0
    (place / "data/cache").rename(place / "elsewhere")
    message = refused(place, CHECKPOINT, {"load": "saved", "hidden_size": 32, "save": "new"})
    assert "saved/iter_0000002" in message
    assert "--hidden-size 16" in message
    assert "--hidden-size 32" in message
    message = refused(place, CHECKPOINT, {"load": "saved", "ckpt_step": 7, "save": "new"})
    assert "--ckpt-step 7" in message
    assert "one of 2" in message


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "code"), [({"global_batch_size": 6}, CONFIG), ({"data_path": "nowhere"}, DATA)])
def test_two_ranks_tell_it_once(flags: dict[str, Value], code: int, place: Path) -> None:
    """Under torchrun, whose own report comes after ours."""
    before = tree(place)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "pretrain_gpt.py")]
    done = subprocess.run(
        [*launch, *words(FLAGS | flags)], env=environment(), cwd=place, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert re.search(rf"exitcode  : {code} ", done.stderr)
    assert "rank 1] error" not in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert tree(place) == before
