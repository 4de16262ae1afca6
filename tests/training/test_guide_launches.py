"""The launches and ds_config.json files by which users compare DeepSpeed and Megatron: planned at their real size, and
trained with sizes reduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.recipe import as_rank, run

ACTIVATIONS = {"partition_activations": True, "contiguous_memory_optimization": True}
GPT3_JSON: dict[str, Any] = {
    "train_batch_size": 1536,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 1,
        "reduce_bucket_size": 500000000,
        "allgather_bucket_size": 500000000,
        "overlap_comm": True,
        "contiguous_gradients": True,
    },
    "activation_checkpointing": {
        **ACTIVATIONS,
        "cpu_checkpointing": False,
        "synchronize_checkpoint_boundary": False,
    },
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
}
MIDDLE_JSON: dict[str, Any] = {
    "train_batch_size": 512,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 500000000, "allgather_bucket_size": 500000000},
    "activation_checkpointing": ACTIVATIONS,
    "gradient_clipping": 1.0,
    "wall_clock_breakdown": False,
}


class Launch(NamedTuple):
    """What is typed, on how many ranks, and what becomes smaller when it is tried here."""

    flags: str
    ranks: int
    json: dict[str, Any] | None
    smaller: dict[str, int]


LAUNCHES = {
    "175b": Launch(
        """--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96 --hidden-size 12288
        --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1
        --global-batch-size 1536 --train-iters 500000 --lr 0.00012 --min-lr 1.0e-5 --lr-decay-style cosine
        --lr-warmup-fraction 0.01 --clip-grad 1.0 --bf16 --deepspeed --deepspeed_config ds_config.json --zero-stage 1
        --deepspeed-activation-checkpointing --data-path my-gpt3_00_text_document --vocab-file gpt2-vocab.json
        --merge-file gpt2-merges.txt --save-interval 1000 --save checkpoints/gpt3-175b --load checkpoints/gpt3-175b
        --tensorboard-dir tensorboard""",
        256,
        GPT3_JSON,
        {
            "tensor-model-parallel-size": 2,
            "pipeline-model-parallel-size": 2,
            "num-layers": 4,
            "global-batch-size": 8,
            "num-attention-heads": 4,
        },
    ),
    "megatron": Launch(
        """--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --num-layers 24 --hidden-size 2048
        --num-attention-heads 16 --micro-batch-size 4 --global-batch-size 128 --seq-length 1024
        --max-position-embeddings 1024 --train-iters 500000 --lr 2.5e-4 --clip-grad 1.0 --bf16 --split 969,30,1
        --data-path my-gpt3_text_document""",
        8,
        None,
        {"num-layers": 2, "global-batch-size": 16, "num-attention-heads": 4},
    ),
    "megatron-deepspeed": Launch(
        """--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --num-layers 48 --hidden-size 4096
        --num-attention-heads 32 --micro-batch-size 2 --global-batch-size 512 --seq-length 2048 --train-iters 500000
        --lr 1.2e-4 --clip-grad 1.0 --bf16 --deepspeed --deepspeed_config ds_config.json --zero-stage 1
        --deepspeed-activation-checkpointing --data-path my-gpt3_text_document""",
        32,
        MIDDLE_JSON,
        {
            "tensor-model-parallel-size": 2,
            "pipeline-model-parallel-size": 2,
            "num-layers": 4,
            "global-batch-size": 8,
            "num-attention-heads": 4,
        },
    ),
}
TINY = {"hidden-size": 32, "seq-length": 16, "max-position-embeddings": 16, "train-iters": 3}


@pytest.mark.parametrize("name", LAUNCHES)
def test_planned_at_its_real_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LAUNCHES[name]
    monkeypatch.chdir(tmp_path)
    if launch.json is not None:
        Path("ds_config.json").write_text(json.dumps(launch.json))
    done = run([*launch.flags.split(), "--dry-run"], WORLD_SIZE=str(launch.ranks))
    assert done.code == 0, done.err
    assert f"world size       {launch.ranks} = " in done.out
    assert [path.name for path in tmp_path.iterdir()] == (["ds_config.json"] if launch.json else [])


def reduced(launch: Launch) -> list[str]:
    """The same words, with smaller numbers and without the files that are not there."""
    smaller, out = TINY | launch.smaller, []
    words = iter(launch.flags.split())
    for word in words:
        name = word.removeprefix("--")
        if name in smaller:
            out += [word, str(smaller[name])]
            next(words)
        elif name in ("data-path", "vocab-file", "merge-file", "tensorboard-dir", "load"):
            next(words)
        else:
            out.append(word)
    mock = "--mock-data --tokenizer-type NullTokenizer --vocab-size 99 --device cpu --eval-iters 0"
    return [*out, *mock.split()]


@pytest.mark.parametrize("name", LAUNCHES)
def test_trains_with_sizes_reduced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LAUNCHES[name]
    monkeypatch.chdir(tmp_path)
    if launch.json is not None:
        small = launch.json | {"train_batch_size": launch.smaller["global-batch-size"]}
        Path("ds_config.json").write_text(json.dumps(small))
    said = run_ranks(as_rank, 8, [*reduced(launch), "--log-interval", "1"])
    lines = [line for out in said for line in out.splitlines() if line.startswith(" iteration")]
    assert [line.split("/")[0].split()[-1] for line in lines] == ["1", "2", "3"]
    assert all("lm loss: 4." in line for line in lines)  # ln 100 = 4.6
    assert ("ds_config.json and flags" in said[0]) == (launch.json is not None)
