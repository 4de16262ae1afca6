"""The whole command line: one owner per flag, Megatron's names, and a word about those that we do not have."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import pytest

from megatron_ds.cli import flags_of
from megatron_ds.compat import HINTS, CompatConfig
from megatron_ds.config import (
    GROUPS,
    Config,
    attributed,
    explain,
    overridden,
    parse,
    parser,
    with_checkpoint_model,
)
from megatron_ds.errors import CheckpointError, ConfigError

# Flags of Megatron-LM and Megatron-DeepSpeed that change nothing here, with a value where they take one.
WITHOUT_EFFECT = """
    --use-mcore-models --no-position-embedding
    --no-async-tensor-model-parallel-allreduce --cross-entropy-loss-fusion --cross-entropy-fusion-impl=te
    --abort-on-unmet-fused-kernel-constraints --disable-mem-efficient-ln --sync-tp-duplicated-parameters
    --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --no-query-key-layer-scaling
    --overlap-grad-reduce --no-contiguous-buffers-in-local-ddp --DDP-impl=local
    --no-check-for-nan-in-loss-and-grad --empty-unused-memory-level=2 --calculate-per-token-loss
    --no-create-attention-mask-in-dataloader --data-impl=mmap --mmap-warmup --transformer-impl=transformer_engine
    --ckpt-format=torch_dist --auto-detect-ckpt-format --dist-ckpt-strictness=log_all --use-dist-ckpt
    --universal-checkpoint --no-load-rng --no-save-rng --no-load-lr-state --no-pipeline-parallel
    --override-opt_param-scheduler --override-opt-param-scheduler --override-lr-scheduler --exit-signal-handler
    --log-throughput --no-log-loss-scale-to-tensorboard --no-barrier-with-level-1-timing --logging-level=20
    --use-cpu-initialization --local_rank=3 --local-rank=3 --overlap-p2p-communication
    --no-overlap-p2p-communication --no-scatter-gather-tensors-in-pipeline --enable-zbh1-exact-semantics
    --deepspeed-activation-checkpointing --contigious-checkpointing --synchronize-each-layer --profile-backward
    --zero-reduce-scatter --zero-contigious-gradients --zero-reduce-bucket-size=5e8 --zero-allgather-bucket-size=5e8
    --scattered-embeddings --split-transformers --memory-centric-tiled-linear --tile-factor=4 --use-pin-memory
    --deepspeed_mpi --ds_fused_adam --num-experts=1 --moe-expert-parallel-size=1 --expert-model-parallel-size=1
    --mlp-type=standard --topk=1 --expert-interval=2 --moe-train-capacity-factor=1.0 --moe-eval-capacity-factor=1.0
    --moe-min-capacity=4 --moe-loss-coeff=0.01 --create-moe-param-group --disable-moe-token-dropping
"""

# The most frequent flags of 89 public launch scripts that have an effect here.
WITH_EFFECT = """
    --use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder
    --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --no-persist-layer-norm --no-gradient-accumulation-fusion --attention-backend=flash --kernels=reference
    --clip-grad=1.0 --eval-interval=100 --eval-iters=10 --global-batch-size=16 --hidden-size=1024 --log-interval=10
    --lr=3e-4 --lr-decay-style=cosine --max-position-embeddings=1024 --micro-batch-size=4 --min-lr=1e-5
    --num-attention-heads=16 --split=949,50,1 --data-path=a --num-layers=24 --save-interval=1000 --weight-decay=1e-2
    --seq-length=1024 --load=x --save=x --tensor-model-parallel-size=2 --vocab-file=v --pipeline-model-parallel-size=2
    --tensorboard-dir=t --merge-file=m --adam-beta1=0.9 --adam-beta2=0.95 --init-method-std=0.006
    --num-workers=0 --zero-stage=1 --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
    --exit-duration-in-mins=1190 --log-batch-size-to-tensorboard --tensorboard-queue-size=1 --lr-decay-iters=320000
    --lr-warmup-fraction=.01 --distributed-backend=nccl --seed=1234 --ffn-hidden-size=4096 --exit-interval=100
    --tokenizer-type=GPT2BPETokenizer --attention-dropout=0 --hidden-dropout=0 --kv-channels=64 --disable-bias-linear
    --lr-warmup-iters=2 --normalization=rmsnorm --swiglu --tokenizer-model=x --untie-embeddings-and-output-weights
    --use-rotary-position-embeddings --bf16 --encoder-seq-length=512 --position-embedding-type=rope
    --rotary-percent=0.25 --make-vocab-size-divisible-by=1 --rotary-base=10000
    --use-distributed-optimizer --vocab-extra-ids=100 --data-cache-path=c --distributed-timeout-minutes=60
    --group-query-attention --num-query-groups=8 --manual-gc --manual-gc-interval=100 --no-mmap-bin-files
    --mock-data --vocab-size=32000 --log-params-norm --log-num-zeros-in-grad --timing-log-level=2 --no-load-optim
    --norm-epsilon=1e-5 --layernorm-epsilon=1e-5 --num-key-value-heads=8 --tokenizer-name-or-path=x
    --rotary-position-embeddings-theta=500000 --no-log-learnig-rate-to-tensorboard --train-samples=220_000_000
    --dataloader-type=cyclic --adam-eps=1e-8 --persistent-save-interval=5 --lr-wsd-decay-style=minus_sqrt
    --deepspeed --deepspeed_config=x --deepscale --deepscale-config=x --zero-stage=1.0 --fp16 --overlap-param-gather
    --loss-scale=12 --initial-loss-scale=65536 --min-loss-scale=0.5 --loss-scale-window=500 --hysteresis=4
    --checkpoint-activations --checkpoint-num-layers=1 --recompute-granularity=full --recompute-method=uniform
    --recompute-activations --partition-activations --checkpoint-in-cpu --sequence-parallel
    --context-parallel-size=2 --ds-sequence-parallel-size=2 --num-layers-per-virtual-pipeline-stage=1
    --step-batch-size-schedule=0:8 --grad-reduce-in-bf16 --enable-zbh1-pipeline
    --decoder-seq-length=128 --encoder-num-layers=12 --decoder-num-layers=6 --mask-prob=0.2 --short-seq-prob=0.2
    --noise-density=0.15 --mean-noise-span-length=3 --bert-no-binary-head --no-bias-gelu-fusion --openai-gelu
    --apply-layernorm-1p --apply-residual-connection-post-layernorm --embed-layernorm --qk-layernorm --squared-relu
    --glu-activation=geglu --add-qkv-bias --reset-attention-mask --reset-position-ids --eod-mask-loss
    --pipeline-model-parallel-split-rank=1 --use-rope-scaling --rope-scaling-factor=32 --window-size=511
    --rotary-seq-len-interpolation-factor=4 --relative-attention-num-buckets=16 --relative-attention-max-distance=64
    --use-checkpoint-args --exit-on-missing-checkpoint --print-config
"""

DEFAULTS = """
    --clip-grad=1.0 --weight-decay=1e-2 --adam-beta1=0.9 --seed=1234 --rotary-base=10000
    --norm-epsilon=1e-5 --layernorm-epsilon=1e-5 --adam-eps=1e-8
"""
"""Those of them that scripts type although they are the default."""


def error_of(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return caught.value


def test_no_two_groups_claim_one_flag_or_one_name() -> None:
    flags = [flag for group in GROUPS.values() for flag in flags_of(group)]
    spellings = Counter(name.replace("_", "-") for flag in flags for name in dict.fromkeys(flag.names))
    assert [name for name, count in spellings.items() if count > 1] == []
    # describe() lists all fields in one block, so their names must differ too
    assert [name for name, count in Counter(flag.field for flag in flags).items() if count > 1] == []


def test_no_hint_for_a_flag_that_exists() -> None:
    known = {name.replace("_", "-") for group in GROUPS.values() for flag in flags_of(group) for name in flag.names}
    assert known.isdisjoint(HINTS)


@pytest.mark.parametrize("word", WITHOUT_EFFECT.split())
def test_flags_without_effect_are_accepted_and_named(word: str) -> None:
    config = parse([word])
    assert len(config.compat.used()) == 1
    nothing = parse([])
    others = [name for name in GROUPS if name != "compat"]
    assert [vars(config)[name] for name in others] == [vars(nothing)[name] for name in others]


@pytest.mark.parametrize("word", WITH_EFFECT.split())
def test_flags_with_effect_change_one_value(word: str) -> None:
    given, default = parse([word]), parse([])
    assert given.compat == default.compat
    changed = [
        (name, field)
        for name in GROUPS
        for field, value in vars(vars(given)[name]).items()
        if value != vars(vars(default)[name])[field]
    ]
    assert len(changed) == (word not in DEFAULTS.split())


def test_spellings() -> None:
    for argv in (
        ["--num-layers", "3", "--micro_batch_size", "2"],
        ["--num_layers", "3", "--micro-batch-size=2"],
        ["--num_layers=3", "--micro_batch_size=2"],
    ):
        config = parse(argv)
        assert (config.model.num_layers, config.training.micro_batch_size) == (3, 2)
    assert parse(["--data-path", "a_b", "--tokenizer_type=My_Type"]).data.data_path == ("a_b",)
    assert parse(["--tokenizer_type=My_Type"]).tokenizer.tokenizer_type == "My_Type"
    assert parse(["--data-path", "0.3", "a", "0.7", "b", "--swiglu"]).data.data_path == ("0.3", "a", "0.7", "b")


def test_names_of_other_systems_mean_the_same() -> None:
    model = parse(["--position-embedding-type", "rotary", "--normalization=LAYERNORM", "--num-key-value-heads=4"]).model
    assert (model.position_embedding_type, model.normalization, model.uses_rope) == ("rope", "LayerNorm", True)
    assert model.kv_heads == 4
    groups = ["--group-query-attention", "--num-query-groups=4", "--num-attention-heads=8"]
    assert parse(groups).model.kv_heads == 4
    assert parse(groups[1:]).model.kv_heads == 8  # without the switch the number of groups means nothing


@pytest.mark.parametrize("flag", HINTS)
def test_flags_that_we_know_but_do_not_have(flag: str) -> None:
    for spelt in (flag, flag.replace("-", "_").replace("__", "--", 1), f"{flag}=1"):
        error = error_of(spelt)
        assert error.subject == flag
        assert error.fix == HINTS[flag]
        assert "does not have" in error.found


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--num-layer", "--num-layers"),
        ("--tensor-model-paralel-size", "--tensor-model-parallel-size"),
        ("--globl_batch_size", "--global-batch-size"),
        ("--train-iter", "--train-iters"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
    ],
)
def test_a_misspelt_flag_names_its_nearest(word: str, nearest: str) -> None:
    assert nearest in error_of(word, "3").fix
    assert nearest in error_of(f"{word}=3").fix


def test_help_shows_every_flag_under_its_group() -> None:
    page = parser("pretrain_gpt.py").format_help()
    heads = re.findall(r"^(\w.*):$", page, re.MULTILINE)
    titles = [(group.__doc__ or "").splitlines()[0].rstrip(".") for group in GROUPS.values()]
    assert [head for head in heads if head in titles] == titles
    for group, title in zip(GROUPS.values(), titles, strict=True):
        section = re.split(r"^\S", page.split(f"\n{title}:\n")[1], flags=re.MULTILINE)[0]
        for flag in flags_of(group):
            for name in flag.names:
                assert re.search(rf"(^|[\s,]){re.escape(name)}([\s,]|$)", section), f"{name} is not under {title}"


def test_every_flag_has_a_sentence() -> None:
    for group in GROUPS.values():
        for flag in flags_of(group):
            assert flag.help.endswith("."), flag.names
            assert len(flag.help) > 8


def test_describe_lists_every_value_sorted() -> None:
    lines = parse(["--num-layers=3", "--use-mcore-models", "--split=1,2,3"]).describe().splitlines()
    assert lines[0] == "------------------------ arguments ------------------------"
    assert lines[-1] == "-------------------- end of arguments ---------------------"
    assert "  num_layers ..................................... 3" in lines
    assert "  split .......................................... 1,2,3" in lines
    names = [line.split()[0].lower() for line in lines[1:-1]]
    assert names == sorted(names)
    expected = sum(len(dataclasses.fields(group)) for group in GROUPS.values() if group is not CompatConfig)
    assert len(names) == expected


def test_what_a_recipe_prefers_yields_to_what_is_typed() -> None:
    recipe = {"tokenizer_type": "GPT2BPETokenizer", "seq_length": 512}
    assert parse([], recipe).tokenizer.tokenizer_type == "GPT2BPETokenizer"
    assert parse(["--tokenizer-type", "NullTokenizer"], recipe).tokenizer.tokenizer_type == "NullTokenizer"
    with pytest.raises(ConfigError, match="sequence"):
        parse([], {"sequence": 512})


def test_what_has_no_flag_is_for_the_recipe_to_say() -> None:
    assert parse([], {"model_type": "T5"}).model.model_type == "T5"
    assert error_of("--model-type", "T5").subject == "--model-type"


def test_origins() -> None:
    config = parse(["--num-layers=3", "--model-preset=gpt2-355m", "--swiglu"], {"seq_length": 8, "hidden_size": 5})
    assert config.origins == {
        "model.num_layers": "command line",
        "preset.model_preset": "command line",
        "model.swiglu": "command line",
        "model.hidden_size": "preset gpt2-355m",
        "model.num_attention_heads": "preset gpt2-355m",
        "model.max_position_embeddings": "preset gpt2-355m",
        "data.seq_length": "recipe",
    }
    assert (config.model.num_layers, config.model.hidden_size, config.data.seq_length) == (3, 1024, 8)


def test_what_a_file_changes_is_put_down_to_it() -> None:
    before = parse(["--micro-batch-size=2", "--lr=0.1"])
    new = dataclasses.replace(before.training, micro_batch_size=4, global_batch_size=8)
    after = attributed(before, dataclasses.replace(before, training=new), "a file")
    assert after.origins == {
        "optimizer.lr": "command line",
        "training.micro_batch_size": "a file",
        "training.global_batch_size": "a file",
    }
    assert after.typed == {"optimizer.lr"}
    assert overridden(before, after) == ["--micro-batch-size: 2 was typed, 4 holds (a file)"]


def explained(*argv: str, **recipe: object) -> dict[str, list[str]]:
    """Of each flag in the table, value and origin."""
    lines = explain(parse(argv, recipe)).splitlines()
    rows = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith("  --")]
    return {flag: rest for flag, *rest in rows}


def test_explain_shows_every_value_and_its_origin() -> None:
    rows = explained("--swiglu", "--disable-bias-linear", "--rampup-batch-size", "8", "8", "99", "--mmap-warmup")
    assert rows["--swiglu"] == ["on", "command line"]
    assert rows["--disable-bias-linear"] == ["on", "command line"]
    assert rows["--no-mmap-bin-files"] == ["off", "default"]
    assert rows["--rampup-batch-size"] == ["8 8 99", "command line"]
    assert rows["--mmap-warmup"] == ["on", "command line"]
    assert rows["--vocab-file"] == ["-", "default"]
    assert explained(vocab_file="x")["--vocab-file"] == ["x", "recipe"]
    shown = {flag.names[0] for group in GROUPS.values() if group is not CompatConfig for flag in flags_of(group)}
    assert set(rows) == shown | {"--mmap-warmup"}


def test_explain_puts_defaults_last_in_every_group() -> None:
    sections = explain(parse(["--norm-epsilon=1e-6", "--adam-eps=1", "--lr=1"])).split("\n\n")
    for section in sections[:-1]:
        origins = [line.endswith(" default") for line in section.splitlines()[1:]]
        assert origins == sorted(origins), section


def test_explain_works_out_what_follows() -> None:
    def follows(*argv: str, **recipe: object) -> dict[str, str]:
        last = explain(parse(argv, recipe)).split("\n\n")[-1].splitlines()
        assert last[0] == "What follows"
        return {name.strip(): value.strip() for name, value in (line.rsplit("   ", 1) for line in last[1:])}

    llama = follows(
        "--hidden-size=64", "--num-attention-heads=8", "--num-key-value-heads=2", "--swiglu", "--zero-stage=2"
    )
    assert (llama["head size"], llama["key/value heads"], llama["ZeRO stage"]) == ("8", "2", "2")
    assert (llama["MLP width"], llama["activation"], llama["positions"]) == ("128", "swiglu", "learned_absolute")
    t5 = follows("--encoder-num-layers=3", "--decoder-num-layers=2", "--relu", model_type="T5")
    assert (t5["layers"], t5["activation"]) == ("3 in the encoder, 2 in the decoder", "relu")
    assert "head size" not in t5


TOKENIZER = {"tokenizer_type": "NullTokenizer", "vocab_size": 100, "vocab_file": "old/vocab.txt", "vocab_extra_ids": 7}


def state_of(*argv: str, **recipe: object) -> dict[str, Any]:
    """What a checkpoint of such a run says beside its tensors."""
    config = parse(argv, recipe)
    tokenizer = dataclasses.asdict(config.tokenizer) | TOKENIZER | {"make_vocab_size_divisible_by": 1}
    return {"model": dataclasses.asdict(config.model), "tokenizer": tokenizer, "max_positions": 77}


STORED = ["--num-layers=2", "--hidden-size=16", "--num-attention-heads=2", "--swiglu", "--norm-epsilon=1e-6"]


def test_a_checkpoint_says_what_the_model_is() -> None:
    typed = ["--load=d", "--hidden-size=32", "--num-layers=2", "--relu", "--vocab-file=new/vocab.txt", "--lr=1"]
    before = parse(typed)
    after = with_checkpoint_model(before, state_of(*STORED))
    model, tokenizer = after.model, after.tokenizer
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (2, 16, 2)
    assert (model.swiglu, model.relu, model.norm_epsilon, model.max_position_embeddings) == (True, False, 1e-6, 77)
    assert (tokenizer.tokenizer_type, tokenizer.vocab_size, tokenizer.vocab_extra_ids) == ("NullTokenizer", 100, 7)
    # a typed path says where the file lies now, and padding belongs to the layout
    assert (tokenizer.vocab_file, tokenizer.make_vocab_size_divisible_by) == ("new/vocab.txt", 128)
    assert after.origins["model.swiglu"] == "checkpoint d"
    assert after.origins["optimizer.lr"] == "command line"
    assert after.optimizer == before.optimizer
    assert overridden(before, after) == [
        "--hidden-size: 32 was typed, 16 holds (checkpoint d)",
        "--relu: on was typed, off holds (checkpoint d)",
    ]


def test_a_checkpoint_remembers_its_files_unless_they_are_typed() -> None:
    after = with_checkpoint_model(parse(["--load=d"]), state_of(*STORED))
    assert after.tokenizer.vocab_file == "old/vocab.txt"


def test_a_checkpoint_of_another_recipe() -> None:
    with pytest.raises(ConfigError) as caught:
        with_checkpoint_model(parse(["--load=d"]), state_of(*STORED, model_type="BERT"))
    assert (caught.value.subject, caught.value.fix) == ("--load d", "pretrain_bert.py")


@pytest.mark.parametrize("key", ["model", "tokenizer", "max_positions"])
def test_a_checkpoint_that_says_nothing(key: str) -> None:
    state = state_of(*STORED)
    del state[key]
    with pytest.raises(CheckpointError, match=f"cannot be read: '{key}'"):
        with_checkpoint_model(parse(["--load=d"]), state)
    with pytest.raises(CheckpointError, match="hidden_sise"):
        with_checkpoint_model(parse(["--load=d"]), state_of(*STORED) | {"model": {"hidden_sise": 3}})


def test_a_config_needs_no_command_line() -> None:
    assert Config(**{name: group() for name, group in GROUPS.items()}) == parse([])


def test_a_config_knows_what_was_typed() -> None:
    config = parse(["--clip_grad=1.0", "--no-overlap-grad-reduce", "--deepspeed"], {"seq_length": 8})
    assert config.typed == {"optimizer.clip_grad", "optimizer.overlap_grad_reduce", "deepspeed.deepspeed"}
    assert parse([]).typed == frozenset()


@pytest.mark.parametrize("flag", ["--num-experts", "--moe-expert-parallel-size", "--expert-model-parallel-size"])
def test_experts_are_accepted_for_a_dense_model_only(flag: str) -> None:
    assert parse([flag, "1"]).compat.used() == [flag]
    error = error_of(flag, "8")
    assert (error.subject, error.found, error.expected) == (flag, "8", "1")
    assert "mixture-of-experts" in error.fix


def test_experts_per_layer() -> None:
    assert parse(["--num-experts", "1", "1", "--mlp-type", "standard"]).compat.num_experts == (1, 1)
    assert error_of("--num-experts", "1", "16").found == "16"


def test_zero_3_names_the_nearest_stage() -> None:
    error = error_of("--zero-stage", "3")
    assert (error.subject, error.expected, error.fix) == ("--zero-stage", "one of 0, 1, 2", "--zero-stage 2")
