"""Imports only point down the floors, siblings do not know each other, and there are no circles."""

from __future__ import annotations

import pytest

from tests.house.floors import circles, place, violations
from tests.house.source import imports, modules, parse


def test_imports_only_point_down() -> None:
    found = violations(modules())
    assert not found, "\n".join(found)


def test_no_circles() -> None:
    found = circles(modules())
    assert not found, "\n".join(found)


def test_the_whole_package_is_looked_at() -> None:
    names = {module.name for module in modules()}
    assert {"megatron_ds", "megatron_ds.cli", "megatron_ds.parallel.spec", "megatron_ds.training.config"} <= names


@pytest.mark.parametrize(
    ("name", "line", "allowed"),
    [
        ("megatron_ds.model.mlp", "from megatron_ds.kernels.table import Kernels", True),
        ("megatron_ds.model.mlp", "from megatron_ds.model.config import TransformerConfig", True),
        ("megatron_ds.model.mlp", "from megatron_ds import log", True),
        ("megatron_ds.model.mlp", "from megatron_ds.data.config import DataConfig", True),
        ("megatron_ds.model.mlp", "from megatron_ds.data import gpt", False),
        ("megatron_ds.model.mlp", "from megatron_ds.data.gpt import GPTBatch", False),
        ("megatron_ds.model.mlp", "import megatron_ds.plan", False),
        ("megatron_ds.model.mlp", "def f():\n    from megatron_ds.training import loop", False),
        ("megatron_ds.model.mlp", "from megatron_ds import pretrain", False),
        ("megatron_ds.model.config", "from megatron_ds.cli import arg", True),
        ("megatron_ds.model.config", "from megatron_ds.parallel.spec import Box", False),
        ("megatron_ds.optim.zero", "from megatron_ds.checkpoint.layout import Piece", False),
        ("megatron_ds.plan", "from megatron_ds.config import Config", True),
        ("megatron_ds.plan", "from megatron_ds.optim.lr import lr_at", True),
        ("megatron_ds.training.step", "from megatron_ds.plan import Plan", True),
        ("megatron_ds.attic.box", "", False),
    ],
)
def test_the_rule_itself(name: str, line: str, allowed: bool) -> None:
    names = ("megatron_ds.log", "megatron_ds.data.gpt", "megatron_ds.training.loop")
    empty = [parse(other, "") for other in names]
    assert (violations([parse(name, line), *empty]) == []) is allowed


def test_circles_are_found() -> None:
    a = parse("megatron_ds.model.a", "from megatron_ds.model import b")
    b = parse("megatron_ds.model.b", "from megatron_ds.model.c import x")
    c = parse("megatron_ds.model.c", "import megatron_ds.model.a")
    assert circles([a, b]) == []
    assert circles([a, b, c]) == [
        "megatron_ds.model.a -> megatron_ds.model.b -> megatron_ds.model.c -> megatron_ds.model.a"
    ]


def test_configs_lie_on_the_ground() -> None:
    assert place("megatron_ds.optim.config") == (0, "ground") == place("megatron_ds.cli")
    assert place("megatron_ds.config") == (5, "planning")


def test_imports_inside_functions_are_told_apart() -> None:
    text = (
        "import torch\ntry:\n    import apex\nexcept ImportError:\n    pass\ndef f():\n    if f:\n        import wandb"
    )
    found = {item.target: item.inside_function for item in imports(parse("x", text))}
    assert found == {"torch": False, "apex": False, "wandb": True}
