"""The package's own source, parsed once, for the tests of the laws of the house."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_ds"


@dataclass(frozen=True)
class Module:
    """One file of the package under its dotted name."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        """file:line, as editors jump to it."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the statement stands inside a function."""

    target: str
    node: ast.stmt
    inside_function: bool


def parse(name: str, text: str, path: Path = ROOT / "example.py") -> Module:
    """A module from its text."""
    return Module(name, path, text, ast.parse(text, filename=str(path)))


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every file of megatron_ds."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(parse(name, path.read_text(encoding="utf-8"), path))
    return tuple(found)


def imports(module: Module, known: frozenset[str] = frozenset()) -> Iterator[Import]:
    """Every import of a module; `from package import name` counts as package.name where that is a module in `known`."""
    for node, inside in _statements(module.tree, False):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if inner in known else node.module, node, inside)


def _statements(parent: ast.AST, inside: bool) -> Iterator[tuple[ast.stmt, bool]]:
    for child in ast.iter_child_nodes(parent):
        if isinstance(child, ast.stmt):
            yield child, inside
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _statements(child, inside or is_function)
