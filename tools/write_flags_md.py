#!/usr/bin/env python3
"""Write docs/flags.md, every flag of the recipes, from the dataclasses that define them.

python tools/write_flags_md.py            writes it
python tools/write_flags_md.py --check    exit code 1 if it is not what it would write
"""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ds.cli import Flag, flags_of
from megatron_ds.compat import HINTS
from megatron_ds.config import GROUPS

TARGET = Path(__file__).resolve().parents[1] / "docs/flags.md"

HEAD = """# Flags of pretrain_gpt.py, pretrain_bert.py and pretrain_t5.py

Written by `tools/write_flags_md.py` from the dataclasses; do not edit. Names and defaults are Megatron's where it has
them; where one thing has several names, all are here. In a name `_` and `-` are the same. A switch takes no value; its
meaning is what happens when it is given. Rules between flags: `megatron_ds/rules.py`; `--dry-run` names those that
a command line breaks, and refuses a flag that a model does not read.
"""

REFUSED = """## Refused

Known to Megatron-LM or Megatron-DeepSpeed, not to this version. Each ends in exit code 2 and this sentence.

| flag | instead |
|---|---|
"""


def render() -> str:
    """The whole page."""
    refused = "".join(f"| `{name}` | {_cell(hint)} |\n" for name, hint in sorted(HINTS.items()))
    return "\n".join([HEAD, *map(_section, GROUPS.values()), REFUSED + refused])


def _section(group: type) -> str:
    title = (group.__doc__ or "").splitlines()[0].rstrip(".")
    where = f"`{group.__module__.replace('.', '/')}.py`"
    head = f"## {title}\n\n{where}\n\n| flag | value | default | meaning |\n|---|---|---|---|\n"
    return head + "".join(_rows(group))


def _rows(group: type) -> Iterator[str]:
    hints = typing.get_type_hints(group)
    for flag in flags_of(group):
        names = " ".join(f"`{name}`" for name in flag.names)
        yield f"| {names} | {_value(flag, hints[flag.field])} | {_default(flag)} | {_cell(flag.help)} |\n"


def _value(flag: Flag, hint: object) -> str:
    if "action" in flag.options:
        return "switch"
    if "choices" in flag.options:
        return ", ".join(map(str, flag.options["choices"]))
    kinds = [word for word in ("float", "int", "str") if word in str(hint)]
    name = {"float": "number", "int": "whole number", "str": "text"}[kinds[0]]
    return _cell(flag.options["metavar"] or name) + (" ..." if flag.options.get("nargs") == "*" else "")


def _default(flag: Flag) -> str:
    return "" if isinstance(flag.default, bool) or flag.default in (None, ()) else _cell(str(flag.default))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(argv: Sequence[str] | None = None) -> int:
    """Write or compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    check, text = parser.parse_args(argv).check, render()
    if not check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        print(f"{TARGET.name} is not fresh: python tools/write_flags_md.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
