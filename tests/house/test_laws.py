"""The other laws of the house: where communication lives, no hidden state, files and functions of a readable size."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.house.source import Module, imports, modules, parse

Law = Callable[[Module], Iterator[str]]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LATE_IMPORTS = frozenset(
    {
        # optional: the package must import without them
        "amp_C",
        "apex",
        "flash_attn",
        "flash_attn_interface",
        "transformer_engine",
        "transformers",
        "triton",
        "wandb",
        # required, but slow to import, and a process needs one tokenizer and perhaps TensorBoard
        "sentencepiece",
        "tiktoken",
        "tokenizers",
        "torch.utils.tensorboard",
    }
)


def late_imports(module: Module) -> Iterator[str]:
    """Imports inside functions, other than those listed."""
    for item in imports(module):
        if item.inside_function and not {item.target, item.target.split(".")[0]} & LATE_IMPORTS:
            yield f"{module.at(item.node)}: imports {item.target} inside a function"


def stray_communication(module: Module) -> Iterator[str]:
    """torch.distributed outside megatron_ds/parallel."""
    if module.name.startswith("megatron_ds.parallel"):
        return
    for node in ast.walk(module.tree):
        if _names_distributed(node):
            yield f"{module.at(node)}: uses torch.distributed; go through megatron_ds.parallel"


def _names_distributed(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(f"{alias.name}.".startswith("torch.distributed.") for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        whole = [f"{node.module}.{alias.name}." for alias in node.names]
        return any(name.startswith("torch.distributed.") for name in whole)
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"


def globals_written(module: Module) -> Iterator[str]:
    """`global` statements."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield f"{module.at(node)}: global {', '.join(node.names)}"


def guessed_attributes(module: Module) -> Iterator[str]:
    """getattr(config, name, default): a flag that nobody declared."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
            owner = ast.unparse(node.args[0]).split(".")[-1]
            if owner in ("args", "cfg", "config", "plan", "run"):
                yield f"{module.at(node)}: {ast.unparse(node)}"


def long_files(module: Module) -> Iterator[str]:
    """Files that one sitting cannot read."""
    lines = module.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{module.at(module.tree)}: {lines} lines, more than {MAX_FILE_LINES}"


def long_functions(module: Module) -> Iterator[str]:
    """Functions that one screen cannot show."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{module.at(node)}: {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"


def not_ascii(module: Module) -> Iterator[str]:
    """Characters outside ASCII."""
    for number, line in enumerate(module.text.splitlines(), 1):
        if not line.isascii():
            yield f"{module.at(module.tree).split(':')[0]}:{number}: {line.strip()!a}"


LAWS: tuple[Law, ...] = (
    late_imports,
    stray_communication,
    globals_written,
    guessed_attributes,
    long_files,
    long_functions,
    not_ascii,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law) -> None:
    found = [line for module in modules() for line in law(module)]
    assert not found, "\n".join(found)


BROKEN: dict[Law, str] = {
    late_imports: "def f():\n    import json",
    stray_communication: "import torch\ntorch.distributed.barrier()",
    globals_written: "def f():\n    global x\n    x = 1",
    guessed_attributes: "getattr(self.config, 'lr', None)",
    long_files: "x = 1\n" * 401,
    long_functions: "def f():\n" + "    x = 1\n" * 60,
    not_ascii: "x = '\u00e9'",
}
KEPT: dict[Law, str] = {
    late_imports: "import json\ndef f():\n    import wandb\n    import torch.utils.tensorboard",
    stray_communication: "from megatron_ds.parallel.collectives import barrier",
    globals_written: "def f():\n    x = 1",
    guessed_attributes: "getattr(module, 'bias', None)",
    long_files: "x = 1\n" * 400,
    long_functions: "def f():\n" + "    x = 1\n" * 59,
    not_ascii: "x = 'e'",
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_law_itself(law: Law) -> None:
    assert len(list(law(parse("megatron_ds.model.x", BROKEN[law])))) == 1
    assert list(law(parse("megatron_ds.model.x", KEPT[law]))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "from torch.distributed.device_mesh import DeviceMesh",
    ],
)
def test_every_spelling_of_torch_distributed_is_seen(line: str) -> None:
    assert len(list(stray_communication(parse("megatron_ds.optim.x", line)))) == 1
    assert list(stray_communication(parse("megatron_ds.parallel.x", line))) == []
