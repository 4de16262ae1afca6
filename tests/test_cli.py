"""Flags made from dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from megatron_ds.cli import Parser, arg
from megatron_ds.errors import ConfigError
from megatron_ds.optim.config import LRConfig, OptimizerConfig, PrecisionConfig
from megatron_ds.training.config import LoggingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Network size."""

    num_layers: int = arg(2, "Layers of the 100% network...")
    hidden_dropout: float = arg(0.1, "Dropout.")
    ffn_hidden_size: int | None = arg(None, "Width of the MLP.")
    bias: bool = arg(True, "Leave out biases.", "--disable-bias-linear")
    fast: bool = arg(True, "Be slow.")
    swiglu: bool = arg(False, "Gated MLP.")
    normalization: Literal["LayerNorm", "RMSNorm"] = arg("LayerNorm", "Norm.")
    level: Literal[0, 1, 2] | None = arg(None, "Level.")
    derived: int = 7


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files."""

    data_path: tuple[str, ...] = arg((), "Prefixes.")
    split: str = arg("969, 30, 1", "Shares.")
    config_file: str | None = arg(None, "JSON.", "--deepspeed_config", "--ds-config")
    size: int | None = arg(None, "Bytes.", parse=lambda text: int(text.removesuffix("k")) * 1000)


def parse(*argv: str, **defaults) -> tuple[Sizes, Files]:
    parser = Parser(prog="test")
    for group in (Sizes, Files):
        parser.add_config(group)
    parser.hints = {"--num-experts": "this one has no experts"}
    return tuple(parser.parse_configs((Sizes, Files), argv, defaults))


def error_of(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert caught.value.exit_code == 2
    return caught.value


def test_nothing_typed_gives_the_defaults():
    assert parse() == (Sizes(), Files())


def test_values_are_of_their_own_kind():
    argv = "--num-layers 1_000 --hidden-dropout 1e-2 --ffn-hidden-size 8 --level 2 --size 3k"
    sizes, files = parse(*argv.split())
    assert (sizes.num_layers, sizes.hidden_dropout, sizes.ffn_hidden_size, sizes.level) == (1000, 0.01, 8, 2)
    assert type(sizes.level) is int
    assert files.size == 3000
    assert sizes.derived == 7


@pytest.mark.parametrize(
    "argv",
    [
        ["--num-layers", "3", "--ffn-hidden-size", "4", "--deepspeed_config", "a_b.json"],
        ["--num_layers", "3", "--ffn_hidden-size=4", "--deepspeed-config", "a_b.json"],
        ["--num-layers=3", "--ffn_hidden_size", "4", "--deepspeed_config=a_b.json"],
        ["--num-layers=3", "--ffn_hidden_size", "4", "--ds_config=a_b.json"],
    ],
)
def test_dashes_and_underscores_are_one(argv):
    sizes, files = parse(*argv)
    assert (sizes.num_layers, sizes.ffn_hidden_size, files.config_file) == (3, 4, "a_b.json")


def test_switches():
    assert (parse()[0].bias, parse()[0].fast, parse()[0].swiglu) == (True, True, False)
    sizes, _ = parse("--disable-bias-linear", "--no-fast", "--swiglu")
    assert (sizes.bias, sizes.fast, sizes.swiglu) == (False, False, True)


def test_lists_choices_and_optional_values():
    argv = "--data-path 0.3 a_text 0.7 b_text --normalization rmsnorm"
    sizes, files = parse(*argv.split(), "--split", "9, 1")
    assert files.data_path == ("0.3", "a_text", "0.7", "b_text")
    assert sizes.normalization == "RMSNorm"
    assert files.split == "9, 1"


def test_typed_wins_over_the_recipes_defaults_which_win_over_ours():
    sizes, files = parse("--num-layers", "5", num_layers=9, hidden_dropout=0.5, data_path=["x"])
    assert (sizes.num_layers, sizes.hidden_dropout, files.data_path) == (5, 0.5, ("x",))
    with pytest.raises(ConfigError, match="no_such_field"):
        parse(no_such_field=1)


def test_an_unknown_flag_names_its_nearest():
    error = error_of("--num-layer", "3")
    assert error.subject == "--num-layer"
    assert "--num-layers" in error.fix
    assert "--hidden-dropout" in error_of("--hiden_dropout=0.1").fix
    assert error_of("--zzz").fix == "see --help for every flag"


def test_flags_are_never_guessed_from_their_beginning():
    assert error_of("--num", "3").subject == "--num"


def test_a_flag_that_we_know_of_is_explained_however_spelt():
    assert error_of("--num-experts", "8").fix == "this one has no experts"
    assert error_of("--num_experts=8").fix == "this one has no experts"


@pytest.mark.parametrize(
    ("argv", "subject", "found"),
    [
        (["--num-layers"], "--num-layers", "expected one argument"),
        (["--num-layers", "many"], "--num-layers", "invalid int value: 'many'"),
        (["--hidden-dropout", "x"], "--hidden-dropout", "invalid float value: 'x'"),
        (["--level", "x"], "--level", "invalid int value: 'x'"),
        (["--level", "3"], "--level", "invalid choice: 3"),
        (["--normalization", "batch"], "--normalization", "invalid choice: 'batch'"),
        (["--num-layers", "2.5"], "--num-layers", "invalid int value: '2.5'"),
        (["--num-layers", "inf"], "--num-layers", "invalid int value: 'inf'"),
        (["--swiglu=yes"], "--swiglu", "'yes'"),
        (["--swiglu", "yes"], "argument 'yes'", "a value that no flag takes"),
        (["--deepspeed_config"], "--deepspeed_config", "expected one argument"),
    ],
)
def test_wrong_values_are_told_with_their_flag(argv, subject, found):
    error = error_of(*argv)
    assert error.subject == subject
    assert found in error.found


@pytest.mark.parametrize("text", ["500000000", "500_000_000", "5e8", "500000000.0"])
def test_whole_numbers_in_every_spelling(text):
    number = parse(f"--num-layers={text}")[0].num_layers
    assert number == 500_000_000 and type(number) is int


def test_choices_are_numbers_too():
    assert parse("--level", "1.0")[0].level == 1


@pytest.mark.parametrize(
    ("argv", "expected", "fix"),
    [
        (["--level", "3"], "one of 0, 1, 2", "--level 2"),
        (["--level", "-7"], "one of 0, 1, 2", "--level 0"),
        (["--normalization", "rmsnrm"], "one of LayerNorm, RMSNorm", "--normalization RMSNorm"),
        (["--normalization", "zzz"], "one of LayerNorm, RMSNorm", "see --help"),
    ],
)
def test_a_choice_that_is_none_names_the_nearest(argv, expected, fix):
    error = error_of(*argv)
    assert (error.expected, error.fix) == (expected, fix)


def test_what_was_typed_can_be_had_by_itself():
    parser = Parser(prog="test")
    parser.add_config(Sizes)
    assert parser.read(["--num-layers=2", "--disable-bias-linear"]) == {"Sizes.num_layers": 2, "Sizes.bias": False}


def test_help_page(capsys):
    parser = Parser(prog="pretrain_x.py")
    parser.add_config(Sizes)
    parser.add_config(Files)
    with pytest.raises(SystemExit) as left:
        parser.parse_configs((Sizes, Files), ["--help"], {})
    assert left.value.code == 0
    page = capsys.readouterr().out
    flat = " ".join(page.split())
    assert "usage: pretrain_x.py [flags]" in page
    assert "Network size:" in page
    assert "Layers of the 100% network... Default: 2." in flat
    assert "--disable-bias-linear Leave out biases." in flat
    assert "--normalization {LayerNorm,RMSNorm} Norm. Default: LayerNorm." in flat
    assert "--deepspeed_config, --ds-config X JSON." in flat
    assert "--data-path X ... Prefixes." in flat
    assert max(map(len, page.splitlines())) <= 110


def test_the_groups_of_training_take_megatrons_flags():
    groups = (OptimizerConfig, PrecisionConfig, LRConfig, TrainingConfig, LoggingConfig)
    parser = Parser(prog="test")
    for group in groups:
        parser.add_config(group)
    argv = (
        "--micro-batch-size 4 --global-batch-size 128 --train-iters 500000 --lr 2.5e-4 --min-lr 1.0e-5 --clip-grad 1.0"
        " --bf16 --lr-decay-style wsd --lr-warmup-fraction .01 --exit-duration-in-mins 1.5 --timing-log-level 2"
        " --use-distributed-optimizer --no-log-learnig-rate-to-tensorboard --adam-beta2 .95 --exit-interval 7"
    )
    optimizer, precision, lr, training, logging = parser.parse_configs(groups, argv.split(), {})
    assert (optimizer.lr, optimizer.adam_beta2, optimizer.effective_zero_stage) == (2.5e-4, 0.95, 1)
    assert optimizer.overlap_grad_reduce
    assert (precision.bf16, precision.fp16) == (True, False)
    assert (lr.lr_decay_style, lr.lr_warmup_fraction, lr.min_lr) == ("WSD", 0.01, 1e-5)
    assert (training.micro_batch_size, training.exit_duration_in_mins, training.exit_interval) == (4, 1.5, 7)
    assert (logging.timing_log_level, logging.log_learning_rate_to_tensorboard) == (2, False)


@pytest.mark.parametrize(
    ("argv", "stage"),
    [("", 0), ("--zero-stage 1", 1), ("--use-distributed-optimizer", 1), ("--zero-stage 0", 0)],
)
def test_zero_stage_has_two_names(argv, stage):
    parser = Parser(prog="test")
    parser.add_config(OptimizerConfig)
    (optimizer,) = parser.parse_configs((OptimizerConfig,), argv.split(), {})
    assert optimizer.effective_zero_stage == stage
