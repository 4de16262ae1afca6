"""What the flags imply: arithmetic by hand, and a dry run with figures that a user could work out on paper."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ds.config import parse
from megatron_ds.plan import Plan, continue_from, make_plan, pad_vocabulary, samples_from
from tests.helpers.recipe import Value, run, tree, words

BASE: dict[str, Value] = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "seq_length": 1024,
    "micro_batch_size": 4,
    "train_iters": 100,
    "lr": 1e-4,
    "mock_data": True,
}
GPT2_VOCAB = 50257

# The launch of the guide's Megatron-LM section, as users paste it.
GUIDE = """--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --num-layers 24 --hidden-size 2048
    --num-attention-heads 16 --micro-batch-size 4 --global-batch-size 128 --seq-length 1024
    --max-position-embeddings 1024 --train-iters 500000 --lr 2.5e-4 --clip-grad 1.0 --bf16 --split 969,30,1
    --data-path my-gpt3_text_document"""
# Its Megatron-DeepSpeed launches, without the --deepspeed flags.
GUIDE_175B = """--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96 --hidden-size 12288
    --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1
    --global-batch-size 1536 --train-iters 500000 --lr 0.00012 --min-lr 1.0e-5 --lr-decay-style cosine
    --lr-warmup-fraction 0.01 --clip-grad 1.0 --bf16 --zero-stage 1 --data-path my-gpt3_00_text_document
    --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --save-interval 1000 --save checkpoints/gpt3-175b
    --load checkpoints/gpt3-175b --tensorboard-dir tensorboard"""
GUIDE_10B = """--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --num-layers 48 --hidden-size 4096
    --num-attention-heads 32 --micro-batch-size 2 --global-batch-size 512 --seq-length 2048 --train-iters 500000
    --lr 1.2e-4 --clip-grad 1.0 --bf16 --zero-stage 1 --data-path my-gpt3_text_document"""


def plan(world_size: int = 1, vocab: int = GPT2_VOCAB, /, **flags: Value) -> Plan:
    return make_plan(parse(words(BASE | flags)), world_size, vocab)


def test_batch_arithmetic() -> None:
    found = plan(16, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, global_batch_size=64)
    assert found.sizes == {"pp": 2, "dp": 4, "cp": 1, "tp": 2}
    assert found.num_microbatches == 4  # 64 / (4 x 4)
    assert found.tokens_per_batch == 64 * 1024
    assert plan(8).global_batch_size == 32  # a micro-batch of 4 on each of 8 ranks
    assert plan(8).num_microbatches == 1
    assert (plan(8).max_positions, plan(max_position_embeddings=2048).max_positions) == (1024, 2048)


@pytest.mark.parametrize(
    ("size", "tp", "multiple", "padded"),
    [(50257, 1, 128, 50304), (50257, 8, 128, 51200), (50304, 1, 128, 50304), (50305, 1, 128, 50432), (7, 2, 1, 8)],
)
def test_padded_vocabulary(size: int, tp: int, multiple: int, padded: int) -> None:
    assert pad_vocabulary(size, multiple * tp) == padded
    # Sizes that tp = 8 divides too.
    model: dict[str, Value] = {"hidden_size": 1024, "num_attention_heads": 16}
    found = plan(tp, size, tensor_model_parallel_size=tp, make_vocab_size_divisible_by=multiple, **model)
    assert (found.vocab.size, found.vocab.padded) == (size, padded)


def test_sample_counts() -> None:
    found = plan(global_batch_size=8, train_iters=1050, eval_interval=100, eval_iters=7)
    # (1050 // 100 + 1) validations of 7 batches of 8: ten on the way, one at the end
    assert found.samples == (8400, 11 * 7 * 8, 7 * 8)
    found = plan(global_batch_size=8, train_iters=None, train_samples=1003, eval_interval=50, eval_iters=2)
    assert found.train_iters == 125
    assert found.samples == (1003, 3 * 2 * 8, 2 * 8)
    assert plan(eval_iters=0).samples == (400, 0, 0)


def samples_at(iteration: int, train: int, valid: int, **flags: Value) -> tuple[int, int, int]:
    now: dict[str, Value] = {"global_batch_size": 8, "train_iters": 100, "eval_interval": 10, "eval_iters": 2} | flags
    return samples_from(plan(**now), parse(words(BASE | now)).training, iteration, train, valid)


def test_sample_counts_of_a_resumed_run() -> None:
    whole = (800, 11 * 2 * 8, 2 * 8)
    assert samples_at(0, 0, 0) == whole
    for iteration in (1, 9, 10, 55, 99, 100):  # with the same flags the same datasets
        assert samples_at(iteration, iteration * 8, iteration // 10 * 16) == whole
    # 50 iterations of 16 samples behind it, 50 of 8 ahead
    assert samples_at(50, 800, 80)[0] == 1200
    # validated every iteration so far, which took 50 x 16 samples; ahead are those at 60, 70 ... 100 and the last
    assert samples_at(50, 400, 800)[1] == 800 + 6 * 16
    assert samples_at(50, 400, 80, eval_iters=0) == (800, 0, 0)
    # trained to the end and asked once more
    assert samples_at(100, 800, 11 * 16)[1] == 12 * 16


def test_stages() -> None:
    assert plan(1).stages == (((0, 12, True, True),),)
    stages = plan(3, pipeline_model_parallel_size=3).stages
    assert stages == (((0, 4, True, False),), ((4, 8, False, False),), ((8, 12, False, True),))
    assert plan(3, pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=2).stages[0] == (
        (0, 2, True, False),
    )
    interleaved = plan(2, pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=3, global_batch_size=8)
    assert interleaved.num_chunks == 3
    assert interleaved.stages[1] == ((2, 4, False, False), (6, 8, False, False), (10, 12, False, True))
    # The same by layers of a virtual stage.
    by_layers = plan(2, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2, global_batch_size=8)
    assert by_layers.stages == interleaved.stages


def test_stages_by_parameters() -> None:
    # A vocabulary of GPT-2 weighs 5.4 layers of 12 h^2: on two stages both ends hold one, so the layers are halved;
    # on three the one in the middle holds more.
    found = plan(3, pipeline_model_parallel_size=3, pp_partition_method="parameters").stages
    assert [chunk.stop - chunk.start for (chunk,) in found] == [2, 8, 2]


def test_schedules() -> None:
    assert plan().schedule == "1f1b"
    two: dict[str, Value] = {"pipeline_model_parallel_size": 2, "global_batch_size": 16}
    assert plan(2, **two, enable_zbh1_pipeline=True).schedule == "zbh1"
    assert plan(2, **two, pipeline_schedule="gpipe").schedule == "gpipe"
    assert plan(2, **two, num_virtual_stages_per_pipeline_rank=2).schedule == "interleaved"
    assert plan(2, **two, num_layers_per_virtual_pipeline_stage=6).schedule == "1f1b"  # one virtual stage
    assert plan(enable_zbh1_pipeline=True).schedule == "zbh1"  # nothing to fill on one stage, and no harm


def test_actions_of_each_stage() -> None:
    found = plan(2, pipeline_model_parallel_size=2, global_batch_size=16)
    assert found.num_microbatches == 4
    for number in (1, 4):
        stages = found.actions(number)
        assert [sum(action.kind == "F" for action in stage) for stage in stages] == [number, number]
        assert [sum(action.kind == "B" for action in stage) for stage in stages] == [number, number]
    for stage in found.eval_actions:
        assert sum(action.kind == "F" for action in stage) == 4
        assert not any(action.kind == "B" for action in stage)


def test_sequences_are_shared_in_either_way() -> None:
    assert plan(8, tensor_model_parallel_size=2, context_parallel_size=2).sizes == {"pp": 1, "dp": 2, "cp": 2, "tp": 2}
    assert plan(8, ds_sequence_parallel_size=4).sizes == {"pp": 1, "dp": 2, "cp": 4, "tp": 1}
    assert plan(8, context_parallel_size=4).global_batch_size == 8  # a micro-batch of 4 on 2 data-parallel ranks


def test_a_growing_batch() -> None:
    ramped: dict[str, Value] = {"train_iters": None, "train_samples": 1000, "global_batch_size": 32}
    found = make_plan(parse([*words(BASE | ramped), "--rampup-batch-size", "8", "8", "90"]), 2, GPT2_VOCAB)
    assert (found.global_batch_size, found.num_microbatches) == (32, 4)
    # Three increments in 90 samples: at 30, 60 and 90.
    assert [found.global_batch_at(n) for n in (0, 29, 30, 60, 90, 91)] == [8, 8, 16, 24, 32, 32]
    assert [found.num_microbatches_at(n) for n in (0, 30, 60, 91)] == [1, 2, 3, 4]
    # 8 8 8 8 16 16 24 (to 88), 24 (to 112), then (1000 - 112) // 32
    assert found.train_iters == 8 + 27
    assert found.samples.train == 1000
    training = parse(words(BASE | ramped)).training
    # At 88 after 7 iterations: 24 more, then 27 full ones; at 112 the same end.
    assert continue_from(found, training, 7, 88).train_iters == 35
    assert continue_from(found, training, 8, 112).train_iters == 35
    assert continue_from(found, training, 100, 64).train_iters == 100 + 2 + 27
    assert samples_from(found, training, 7, 88, 0).train == 1000  # 88 + 24 + 27 * 32 = 976 fit in it
    assert samples_from(found, training, 0, 500, 0).train == 500 + 35 * 32


def test_zero_stage_under_both_names() -> None:
    assert (plan().zero_stage, plan(zero_stage=1).zero_stage, plan(use_distributed_optimizer=True).zero_stage) == (
        0,
        1,
        1,
    )


# ---- the dry run: figures that a user could work out on paper


def dry_run(flags: str, world_size: int) -> str:
    outcome = run([*flags.split(), "--dry-run", "--world-size", str(world_size)])
    assert outcome.code == 0, outcome.err
    return outcome.out


def memory(page: str) -> list[tuple[int, list[float]]]:
    """Of each stage: parameters of a rank, and GiB of parameters, gradients, optimizer, activations, all."""
    block = page.split("per rank")[1].split("schedule")[0]
    rows = re.findall(r"^ +\d+ +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", block, re.MULTILINE)
    return [(int(count.replace(",", "")), [float(part) for part in parts]) for count, *parts in rows]


def parameters(page: str) -> int:
    found = re.search(r"parameters +([\d,]+)", page)
    assert found
    return int(found[1].replace(",", ""))


def test_the_guides_launch_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = dry_run(GUIDE, 8)
    assert tree(tmp_path) == {}
    assert re.search(r"world size +8 = pp 2 x dp 1 x cp 1 x tp 4, ZeRO stage 0, bf16", page)
    assert re.search(r"128 samples = 4 per micro-batch x 32 micro-batches x 1 ", page)
    assert re.search(r"iterations +500,000\n", page)
    # the default is a validation of 100 batches every 1000 iterations, and one at the end
    assert "64,000,000 to train on, 6,412,800 to validate on, 12,800 to test on" in page
    assert "50,257 tokens, padded to 50,688" in page  # 99 x 512
    assert "embedding, 0-11" in page
    assert "12-23, head" in page
    assert re.search(r"my-gpt3_text_document: not found here", page)
    # 24 layers of 12 h^2 + 13 h, final norm 2 h, tied table of v h, positions s h
    assert parameters(page) == 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048 + (50257 + 1024) * 2048


@pytest.mark.parametrize(
    ("launch", "world_size", "sizes", "microbatches", "layers", "hidden", "seq"),
    [
        (GUIDE_175B, 256, "pp 16 x dp 2 x cp 1 x tp 8", 768, 96, 12288, 2048),
        (GUIDE_10B, 32, "pp 4 x dp 2 x cp 1 x tp 4", 128, 48, 4096, 2048),
    ],
)
def test_the_guides_deepspeed_launches(
    launch: str, world_size: int, sizes: str, microbatches: int, layers: int, hidden: int, seq: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    page = dry_run(launch, world_size)
    assert tree(tmp_path) == {}
    assert f"{world_size} = {sizes}, ZeRO stage 1, bf16" in page
    assert f"x {microbatches} micro-batches x 2 data-parallel ranks" in page
    assert parameters(page) == layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden + (50257 + seq) * hidden


SMALL = "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --micro-batch-size 4 --lr 1e-4 "
SMALL += "--train-iters 10 "
LLAMA = (
    "--num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 --num-key-value-heads 8 "
    "--seq-length 2048 --micro-batch-size 1 --lr 1e-4 --train-iters 10 --position-embedding-type rope --swiglu "
    "--normalization RMSNorm --disable-bias-linear --vocab-size 128256 "
)
# Per layer: queries and output h^2 each, keys and values h x 512 each, three matrices of the MLP, two norms.
LLAMA_LAYERS = 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048


def test_parameters_of_known_models() -> None:
    assert parameters(dry_run(SMALL, 1)) == 124_439_808  # GPT-2 small
    assert parameters(dry_run(SMALL, 4)) == 124_439_808
    two_by_two = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    assert parameters(dry_run(SMALL + two_by_two, 4)) == 124_439_808
    tied = LLAMA + "--tokenizer-type HFTokenizer"
    assert parameters(dry_run(tied, 1)) == LLAMA_LAYERS + 128256 * 2048
    assert parameters(dry_run(tied, 1)) == 1_235_814_400  # Llama 3.2 1B
    untied = tied + " --untie-embeddings-and-output-weights"
    assert parameters(dry_run(untied, 1)) == LLAMA_LAYERS + 2 * 128256 * 2048


@pytest.mark.parametrize(
    ("flags", "world_size", "params", "grads", "optimizer"),
    [
        ("--bf16", 1, 2, 4, 12),  # 18 bytes per parameter
        ("--bf16 --zero-stage 1", 4, 2, 4, 12 / 4),  # 6 + 12 / dp
        ("--bf16 --zero-stage 0", 4, 2, 4, 12),
        ("--bf16 --use-distributed-optimizer --tensor-model-parallel-size 2", 4, 2, 4, 12 / 2),
        ("", 1, 4, 4, 8),  # fp32: the parameters are their own masters
        ("--zero-stage 1", 4, 4, 4, 8 / 4),
    ],
)
def test_bytes_per_rank(flags: str, world_size: int, params: float, grads: float, optimizer: float) -> None:
    ((count, parts),) = memory(dry_run(SMALL + flags, world_size))
    if "tensor" not in flags:
        assert count == 124_439_808 + 47 * 768  # 47 rows of padding
    for found, each in zip(parts, (params, grads, optimizer), strict=False):
        assert found == pytest.approx(count * each / 2**30, abs=0.0051)
    assert parts[4] == pytest.approx(sum(parts[:4]), abs=0.021)


def test_stages_share_parameters_and_both_ends_hold_the_tied_table() -> None:
    first, last = memory(dry_run(SMALL + "--pipeline-model-parallel-size 2", 2))
    layers, table = 6 * (12 * 768**2 + 13 * 768), 50304 * 768
    assert first[0] == layers + table + 1024 * 768
    assert last[0] == layers + table + 2 * 768


def test_a_dry_run_without_a_world_size_takes_the_smallest() -> None:
    outcome = run([*GUIDE.split(), "--dry-run"])
    assert outcome.code == 0
    assert "planning for 8, the smallest" in outcome.out


def test_a_dry_run_tells_broken_rules_too() -> None:
    outcome = run([*GUIDE.split(), "--dry-run", "--world-size", "12"])
    assert outcome.code == 2
    assert outcome.err.startswith("error: --tensor-model-parallel-size x --pipeline-model-parallel-size")
