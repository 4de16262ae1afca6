"""Flags under Megatron's names."""

from __future__ import annotations

from megatron_ds.checkpoint.config import CheckpointConfig
from megatron_ds.cli import Parser


def parse(*argv: str) -> CheckpointConfig:
    parser = Parser()
    parser.add_config(CheckpointConfig)
    return parser.parse_configs([CheckpointConfig], argv, {})[0]


def test_defaults() -> None:
    config = parse()
    assert (config.save, config.load, config.save_interval, config.ckpt_step) == (None, None, None, None)
    assert (config.finetune, config.save_optim, config.load_optim) == (False, True, True)


def test_megatrons_spelling() -> None:
    config = parse("--save", "a", "--load=b", "--save_interval", "5", "--ckpt-step", "7", "--finetune")
    off = parse("--no-save-optim", "--no-load-optim")
    assert (config.save, config.load, config.save_interval, config.ckpt_step) == ("a", "b", 5, 7)
    assert (config.finetune, config.save_optim, config.load_optim) == (True, True, True)
    assert (off.save_optim, off.load_optim) == (False, False)
    assert parse("--persistent-save-interval", "9").save_interval == 9
