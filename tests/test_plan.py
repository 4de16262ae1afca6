"""What the flags imply: arithmetic by hand, and every rule with its legal neighbours and the way out that it offers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ds.config import parse
from megatron_ds.errors import ConfigErrors
from megatron_ds.plan import Plan, make_plan, pad_vocabulary, samples_from
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
    assert plan(1).stages == ((0, 12, True, True),)
    stages = plan(3, pipeline_model_parallel_size=3).stages
    assert stages == ((0, 4, True, False), (4, 8, False, False), (8, 12, False, True))


def test_zero_stage_under_both_names() -> None:
    assert (plan().zero_stage, plan(zero_stage=1).zero_stage, plan(use_distributed_optimizer=True).zero_stage) == (
        0,
        1,
        1,
    )


# Of each rule: ranks, flags that break it, the flag that the message is about, and near ones that do not.
RULES: dict[str, tuple[int, dict[str, Value], str, dict[str, Value]]] = {
    "world": (6, {"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size", {"tensor_model_parallel_size": 3}),
    "world, pp": (8, {"pipeline_model_parallel_size": 3}, "--pipeline-model", {"pipeline_model_parallel_size": 4}),
    "world and batch": (
        6, {"tensor_model_parallel_size": 4, "global_batch_size": 8}, "--tensor-model-parallel-size",
        {"tensor_model_parallel_size": 6, "global_batch_size": 8},
    ),
    "heads": (1, {"num_attention_heads": 7}, "--num-attention-heads", {"num_attention_heads": 8}),
    "heads, free size": (1, {"num_attention_heads": 7}, "--num-att", {"num_attention_heads": 7, "kv_channels": 64}),
    "heads over tp": (
        8, {"num_attention_heads": 12, "tensor_model_parallel_size": 8, "global_batch_size": 64},
        "--num-attention-heads", {"num_attention_heads": 16, "tensor_model_parallel_size": 8, "global_batch_size": 64},
    ),
    "heads of GPT-2 XL over tp": (
        2, {"num_attention_heads": 25, "hidden_size": 1600, "num_layers": 48, "tensor_model_parallel_size": 2},
        "--num-attention-heads",
        {"num_attention_heads": 25, "hidden_size": 1600, "num_layers": 48, "tensor_model_parallel_size": 1},
    ),
    "key/value heads": (1, {"num_key_value_heads": 5}, "--num-key-value-heads", {"num_key_value_heads": 4}),
    "groups": (
        1, {"group_query_attention": True, "num_query_groups": 8}, "--num-query-groups",
        {"group_query_attention": True, "num_query_groups": 6},
    ),
    "groups over tp": (
        4, {"num_key_value_heads": 2, "tensor_model_parallel_size": 4, "global_batch_size": 4},
        "--num-key-value-heads", {"num_key_value_heads": 4, "tensor_model_parallel_size": 4, "global_batch_size": 4},
    ),
    "rotary percent": (1, {"position_embedding_type": "rope", "rotary_percent": 0.24}, "--rotary-percent",
                       {"position_embedding_type": "rope", "rotary_percent": 0.25}),
    "odd head": (1, {"position_embedding_type": "rope", "kv_channels": 33}, "--rotary-percent", {"kv_channels": 33}),
    "ffn over tp": (
        4, {"ffn_hidden_size": 3070, "tensor_model_parallel_size": 4}, "--ffn-hidden-size",
        {"ffn_hidden_size": 3072, "tensor_model_parallel_size": 4},
    ),
    "layers": (5, {"pipeline_model_parallel_size": 5}, "--num-layers",
               {"pipeline_model_parallel_size": 5, "num_layers": 10}),
    "layers and batch": (
        8, {"pipeline_model_parallel_size": 8, "global_batch_size": 8}, "--num-layers",
        {"pipeline_model_parallel_size": 4, "global_batch_size": 8},
    ),
    "batch": (4, {"global_batch_size": 40}, "--global-batch-size", {"global_batch_size": 48}),
    "batch below": (4, {"global_batch_size": 8}, "--global-batch-size", {"global_batch_size": 16}),
    "samples": (1, {"train_iters": None, "train_samples": 3}, "--train-samples",
                {"train_iters": None, "train_samples": 4}),
    "both durations": (1, {"train_samples": 400}, "--train-iters and --train-samples", {}),
    "save interval": (1, {"save": "x"}, "--save-interval", {"save": "x", "save_interval": 1}),
    "finetune": (1, {"finetune": True}, "--finetune", {"finetune": True, "load": "x"}),
    "positions": (1, {"max_position_embeddings": 1023}, "--max-position-embeddings", {"max_position_embeddings": 1024}),
    "position type": (1, {"position_embedding_type": "alibi"}, "--position-embedding-type",
                      {"position_embedding_type": "rotary", "max_position_embeddings": 2}),
    "norm": (1, {"normalization": "batchnorm"}, "--normalization", {"normalization": "rmsnorm"}),
    "halves": (1, {"bf16": True, "fp16": True}, "--fp16 and --bf16", {"bf16": True}),
    "fp16": (1, {"fp16": True}, "--fp16", {}),
    "zero": (1, {"zero_stage": 0, "use_distributed_optimizer": True}, "--use-distributed-optimizer",
             {"zero_stage": 1, "use_distributed_optimizer": True}),
    "warm-up": (1, {"lr_warmup_iters": 100}, "--lr-warmup-iters", {"lr_warmup_iters": 99}),
    "data": (1, {"mock_data": None}, "--data-path", {"mock_data": None, "data_path": "x"}),
    "no data is no fault of a plan": (1, {"mock_data": None}, "--data-path", {"mock_data": None, "dry_run": True}),
    "split": (1, {"split": "1,2,3,4"}, "--split", {"split": "969, 30, 1"}),
    "log interval": (1, {"log_interval": 0}, "--log-interval", {"log_interval": 1}),
    "dropout": (1, {"hidden_dropout": 1}, "--hidden-dropout", {"hidden_dropout": 0}),
    "count": (1, {"eval_interval": 0}, "--eval-interval", {"eval_interval": 1}),
    "seed": (1, {"seed": -1}, "--seed", {"seed": 0}),
    "rope base": (1, {"rotary_base": 0}, "--rotary-base", {"rotary_base": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rule_its_neighbour_and_its_way_out(rule: str) -> None:
    world_size, broken, subject, legal = RULES[rule]
    plan(world_size, **legal)
    with pytest.raises(ConfigErrors) as caught:
        plan(world_size, **broken)
    (error,) = caught.value.errors
    assert error.subject.startswith(subject) or subject in error.subject
    assert error.found
    assert error.expected
    offered = ways_out(error.fix, world_size)
    for changes, ranks in offered:
        plan(ranks, **broken | changes)
    if not offered:
        assert error.fix, rule  # a sentence


def ways_out(fix: str, world_size: int) -> list[tuple[dict[str, Value], int]]:
    """Every alternative of a message that can be typed as it stands: what it changes, and on how many ranks."""
    out: list[tuple[dict[str, Value], int]] = []
    for option in re.split(r", or |, ", fix):
        flags = re.findall(r"--([a-z0-9-]+)(?: ([\d.,e-]+|[a-z]+$|[A-Z]\w+))?", option)
        changes = {name.replace("-", "_"): value or True for name, value in flags}
        ranks = re.fullmatch(r"start (\d+) ranks", option)
        if ranks:
            out.append(({}, int(ranks[1])))
        elif option.startswith("--") and "PREFIX" not in option and "DIR" not in option and " out" not in option:
            out.append((changes | ({"fp16": None} if "bf16" in changes else {}), world_size))
    return out


def test_ways_out_are_read_as_they_are_meant() -> None:
    fix = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1, or --num-layers 4, or start 6 ranks"
    two = {"tensor_model_parallel_size": "2", "pipeline_model_parallel_size": "1"}
    assert ways_out(fix, 8) == [(two, 8), ({"num_layers": "4"}, 8), ({}, 6)]
    assert ways_out("leave --save out", 1) == []


def test_most_rules_offer_something_to_type() -> None:
    typed = 0
    for world_size, broken, _, _ in RULES.values():
        with pytest.raises(ConfigErrors) as caught:
            plan(world_size, **broken)
        typed += bool(ways_out(caught.value.errors[0].fix, world_size))
    assert typed >= len(RULES) - 6


def test_what_is_missing_is_told_before_what_does_not_fit_together() -> None:
    with pytest.raises(ConfigErrors) as caught:
        plan(3, lr=None, num_layers=None, tensor_model_parallel_size=2, seed=-1)
    assert [error.subject for error in caught.value.errors] == ["--num-layers --lr", "--seed"]


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
