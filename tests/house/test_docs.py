"""The prose tells the truth where a machine can check it: links, file names, flags, command lines."""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.recipe import environment
from tests.house.source import ROOT
from tools import write_flags_md

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
SOURCE = re.compile(r"(?<![\w/.*-])[\w./*-]+\.(?:py|sh|sbatch|md|toml)\b")
RECIPES = ("pretrain_gpt.py", "pretrain_bert.py", "pretrain_t5.py")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
HOMES = (".", "megatron_ds", "docs")
"""Where a path may begin: at the root, in talk of rooms inside the package, in talk of pages beside them."""


def key(path: Path) -> str:
    return str(path.relative_to(ROOT))


def exists(path: str, page: Path) -> bool:
    """Whether some file bears that name; NAME and NNN-title in it stand for anything."""
    if any((home / path).exists() for home in (page.parent, *(ROOT / home for home in HOMES))):
        return True
    pattern = re.sub(r"NAME|NNN-title", "*", path)
    return "*" in pattern and any(any((ROOT / home).glob(pattern)) for home in HOMES)


def missing_links(text: str, page: Path) -> list[str]:
    local = [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    return [target for target in local if not headed(target, page)]


def headed(target: str, page: Path) -> bool:
    """Whether the link's file is there, and, where it names one, a heading of that name in it."""
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    if not path.exists():
        return False
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8") if anchor else "", re.MULTILINE)
    return not anchor or anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def missing_paths(text: str, page: Path) -> list[str]:
    """Sources named anywhere, and in backticks anything that lies in one of our folders."""
    named = set(SOURCE.findall(re.sub(r"https?://\S+", "", text)))
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    named |= {word for code in CODE.findall(text) for word in code.split() if word.startswith((*folders, ".ci/"))}
    return sorted(path for path in named if not exists(path.rstrip(":,"), page))


def commands(text: str) -> list[list[str]]:
    """The command lines of a page's fenced blocks, continued lines joined, comments left out."""
    lines = "".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if re.match(r"\s*(\$ )?(\w+=\S+ )*(python|torchrun|srun|tools/\w+\.py)\b", line):
            found.append(shlex.split(line.strip().removeprefix("$ "), comments=True))
    return found


def launches() -> list[tuple[str, str, list[str]]]:
    """Page, recipe, command."""
    texts = {key(page): page.read_text(encoding="utf-8") for page in PAGES}
    found = [(name, command) for name, text in texts.items() for command in commands(text)]
    return [(name, recipe, c) for name, c in found for recipe in RECIPES if recipe in c]


@pytest.mark.parametrize("page", PAGES, ids=key)
def test_links_lead_somewhere(page: Path) -> None:
    assert missing_links(page.read_text(encoding="utf-8"), page) == []


@pytest.mark.parametrize("page", PAGES, ids=key)
def test_named_files_exist(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8"), page) == []


@pytest.mark.parametrize("page", PAGES, ids=key)
def test_plain_ascii(page: Path) -> None:
    assert page.read_text(encoding="utf-8").isascii()


def test_flags_md_is_fresh() -> None:
    assert write_flags_md.main(["--check"]) == 0, "python tools/write_flags_md.py"


@pytest.mark.parametrize(
    ("page", "recipe", "command"), launches(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_launch_passes_the_dry_run(
    page: str, recipe: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = command.index(recipe)
    launcher, argv = command[:where], command[where + 1 :]
    if "--world-size" not in argv:
        sizes = dict(itertools.pairwise(launcher))
        argv += ["--world-size", str(int(sizes.get("--nnodes", 1)) * int(sizes.get("--nproc-per-node", 1)))]
    monkeypatch.setattr(os, "environ", environment())
    monkeypatch.setattr(sys, "argv", [recipe, *argv, "--dry-run"])
    runpy.run_path(str(ROOT / recipe), run_name="__main__")
    out = capsys.readouterr().out
    assert ("preset" if "--print-config" in argv else "dry run") in out, page


def test_recipe_with_samples_of_its_own_trains(tmp_path: Path) -> None:
    (block,) = BLOCK.findall((ROOT / "docs/data_formats.md").read_text(encoding="utf-8"))
    (tmp_path / "recipe.py").write_text(MY_SAMPLE + block)
    flags = """--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2
        --train-iters 2 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 60 --log-interval 1 --device cpu"""
    done = subprocess.run(
        [sys.executable, "recipe.py", *flags.split()],
        cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("sop loss: ") == 2


MY_SAMPLE = """
def my_sample(i):
    text, asked = [(i + k) % 50 for k in range(16)], [k % 5 == 0 for k in range(16)]
    labels = [t if a else -1 for t, a in zip(text, asked)]
    return {
        "text": text, "types": [0] * 8 + [1] * 8, "labels": labels, "loss_mask": asked, "padding_mask": [1] * 16,
        "is_random": i % 2,
    }

"""


def test_tools_know_the_flags_they_are_given() -> None:
    used: dict[str, set[str]] = {}
    for page in PAGES:
        for command in commands(page.read_text(encoding="utf-8")):
            for tool in (word for word in command if re.fullmatch(r"(tools|benchmarks)/\w+\.py", word)):
                used.setdefault(tool, set()).update(word for word in command if word.startswith("--"))
    assert "tools/preprocess_data.py" in used
    for tool, flags in used.items():
        shown = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        known = set(re.findall(r"--[\w-]+", shown.stdout))
        assert flags <= known, f"{tool}: {sorted(flags - known)}"


def test_there_is_something_to_check() -> None:
    assert {recipe for _, recipe, _ in launches()} == set(RECIPES)
    assert {"README.md", "docs/architecture.md", "docs/flags.md"} <= set(map(key, PAGES))


def test_the_checks_themselves() -> None:
    page = ROOT / "docs/example.md"
    text = "[a](flags.md) [b](nowhere.md) [c](https://x.y/z.md) [d](flags.md#refused) [e](flags.md#no-such)"
    assert missing_links(text, page) == ["nowhere.md", "flags.md#no-such"]
    text = "training/loop.py `megatron_ds/model/` `tests/none/` and scripts/pretrain_NAME.sh, gone.py https://x.y/z.py"
    assert missing_paths(text, page) == ["gone.py", "tests/none/"]
    text = "```\nA=1 torchrun --nproc-per-node 2 pretrain_gpt.py \\\n  --lr 1  # why\nls\n```\npython pretrain_gpt.py\n"
    assert commands(text) == [["A=1", "torchrun", "--nproc-per-node", "2", "pretrain_gpt.py", "--lr", "1"]]
