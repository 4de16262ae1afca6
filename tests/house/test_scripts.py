"""Every script parses, every launch passes --dry-run, and the SLURM job requeues itself when, and only when, it should.

The launchers on PATH are stand-ins: torchrun runs one dry run for all its ranks, srun runs one task.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.source import ROOT

SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch"), ROOT / ".ci/run"])
LAUNCHES = [path for path in SCRIPTS if path.name.startswith("pretrain_") and path.suffix == ".sh"]
SBATCH = ROOT / "scripts/slurm/pretrain_gpt.sbatch"

TORCHRUN = f"""#!{sys.executable}
import json, os, subprocess, sys
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
ranks = int(flags["--nproc-per-node"]) * int(flags.get("--nnodes", 1))
recipe = next(i for i, word in enumerate(sys.argv) if word.endswith(".py"))
command = [sys.executable, *sys.argv[recipe:], "--dry-run", "--world-size", str(ranks)]
done = subprocess.run(command, capture_output=True, text=True)
with open(os.environ["LAUNCHED"], "a") as file:
    row = {{"argv": sys.argv[1:], "ranks": ranks, "code": done.returncode, "said": done.stdout + done.stderr}}
    print(json.dumps(row), file=file)
sys.exit(done.returncode)
"""
SRUN = """#!/usr/bin/env bash
out=/dev/stdout
while [[ "$1" == --* ]]; do
    [[ "$1" != --output=* ]] || out="${1#--output=}"
    shift
done
SLURM_NODEID=0 exec "$@" >>"$out" 2>&1
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1 $2" == "show hostnames" ]]; then
    printf 'localhost\\nelsewhere\\n'
else
    echo "$*" >>"$REQUESTS"
fi
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    no_gpu = "#!/bin/sh\nexit 9\n"
    texts = {"torchrun": TORCHRUN, "srun": SRUN, "scontrol": SCONTROL, "nvidia-smi": no_gpu, "python": python}
    for name, text in texts.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    path = os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]])
    extra = {"LAUNCHED": str(tmp_path / "launched.jsonl"), "REQUESTS": str(tmp_path / "requests")}
    return os.environ | extra | {"PATH": path, "OUT": str(tmp_path / "out"), "USE_ACTIVE_ENV": "1"}


def bash(script: Path, env: dict[str, str], *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(script), *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)


def launched(env: dict[str, str]) -> list[dict[str, Any]]:
    path = Path(env["LAUNCHED"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checkpointed(env: dict[str, str], iteration: int) -> None:
    path = Path(env["OUT"], "checkpoints/latest_checkpointed_iteration.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{iteration}\n")


def test_there_are_scripts() -> None:
    assert {"quickstart.sh", "test.sh", "setup_env.sh", "pretrain_gpt.sbatch", "run"} <= {path.name for path in SCRIPTS}
    kinds = {re.match("pretrain_(bert|t5|[a-z]+)", path.name)[1] for path in LAUNCHES}  # type: ignore[index]
    assert {"gpt", "bert", "t5", "llama"} <= kinds


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_parses_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    found = subprocess.run(
        ["shellcheck", "-x", "-s", "bash", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", LAUNCHES, ids=lambda path: path.name)
def test_launch_passes_the_dry_run_and_resumes(script: Path, env: dict[str, str], tmp_path: Path) -> None:
    checkpointed(env, 3)
    done = bash(script, env, "--seed", "7", cwd=tmp_path)
    (launch,) = launched(env)
    assert (done.returncode, launch["code"], launch["ranks"]) == (0, 0, 8), launch["said"]
    assert "dry run" in launch["said"]
    argv = launch["argv"]
    assert argv[-2:] == ["--seed", "7"]
    assert argv[argv.index("--load") + 1] == argv[argv.index("--save") + 1] == f"{env['OUT']}/checkpoints"


def test_launch_shows_its_plan_without_ranks(env: dict[str, str], tmp_path: Path) -> None:
    plan = bash(LAUNCHES[0], env, "--dry-run", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "dry run" in plan.stdout
    assert launched(env) == []


def test_quickstart_up_to_its_launch(env: dict[str, str], tmp_path: Path) -> None:
    corpus = tmp_path / "my own.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"line {i} of my own text " * 40}) + "\n" for i in range(60)))
    env |= {"CORPUS": corpus.name, "ITERS": "10"}
    wanted = {
        "tp2": "--tensor-model-parallel-size 2",
        "pp2": "--pipeline-model-parallel-size 2",
        "dp2": "--zero-stage 1",
    }
    for number, (layout, flags) in enumerate(wanted.items()):
        if number:
            checkpointed(env, 5 * number)
        done = bash(ROOT / "scripts/quickstart.sh", env | {"LAYOUT": layout}, cwd=tmp_path)
        assert len(launched(env)) == number + 1, done.stdout + done.stderr
        launch = launched(env)[number]
        assert (launch["code"], launch["ranks"]) == (0, 2), launch["said"]
        words = " ".join(launch["argv"])
        assert flags in words
        # from nothing and from 5 the target is 10, from 10 it is 20
        assert f"--train-iters {(10, 10, 20)[number]} " in words
        assert "--load" in words
        assert (re.search("there already: .*merges.txt", done.stdout) is not None) is (number > 0), done.stdout

    corpus.write_text(json.dumps({"text": "something else entirely"}) + "\n")
    other = bash(ROOT / "scripts/quickstart.sh", env, cwd=tmp_path)
    assert other.returncode == 4
    assert "another corpus" in other.stderr
    assert len(launched(env)) == 3


@pytest.mark.parametrize(("kind", "layout"), [("bert", "pp2"), ("t5", "pp2")])
def test_quickstart_of_other_models_up_to_their_launch(
    kind: str, layout: str, env: dict[str, str], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    text = "A first sentence of my own. And a second one follows it. Then the third. "
    corpus.write_text("".join(json.dumps({"text": f"Number {i}. " + text * 10}) + "\n" for i in range(60)))
    done = bash(ROOT / "scripts/quickstart.sh", env | {"CORPUS": corpus.name, "LAYOUT": layout}, kind, cwd=tmp_path)
    (launch,) = launched(env)
    assert (launch["code"], launch["ranks"]) == (0, 2), launch["said"] + done.stderr
    assert Path(launch["argv"][3]).name == f"pretrain_{kind}.py"
    words = " ".join(launch["argv"])
    assert f"--data-path {env['OUT']}/corpus_text_sentence " in words
    assert ("--vocab-extra-ids 100" in words) is (kind == "t5")
    sidecar = json.loads(Path(env["OUT"], "corpus_text_sentence.json").read_text())
    assert (sidecar["tokenizer_type"], sidecar["documents"], sidecar["sequences"]) == (
        "BertWordPieceLowerCase",
        60,
        60 * 31,
    )


def test_quickstart_knows_three_models(env: dict[str, str], tmp_path: Path) -> None:
    done = bash(ROOT / "scripts/quickstart.sh", env, "bart", cwd=tmp_path)
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("bart", "gpt, bert or t5", "fix:"))


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [("LAYOUT", "tp3", 2), ("ITERS", "many", 2), ("ITERS", "0", 2), ("CORPUS", "missing.jsonl", 3)],
)
def test_quickstart_refuses(variable: str, value: str, code: int, env: dict[str, str], tmp_path: Path) -> None:
    done = bash(ROOT / "scripts/quickstart.sh", env | {variable: value}, cwd=tmp_path)
    assert done.returncode == code
    assert all(word in done.stderr for word in (variable, value, "expected:", "fix:"))


def job(env: dict[str, str]) -> dict[str, str]:
    slurm = {"JOB_ID": "42", "JOB_NAME": "j", "JOB_NODELIST": "n[1-2]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "8"}
    return env | {f"SLURM_{key}": value for key, value in slurm.items()} | {"SLURM_SUBMIT_DIR": str(ROOT)}


def requests(env: dict[str, str]) -> str:
    path = Path(env["REQUESTS"])
    return path.read_text() if path.exists() else ""


def test_slurm_job_passes_the_dry_run(env: dict[str, str], tmp_path: Path) -> None:
    done = bash(SBATCH, job(env), "--seed", "7", cwd=tmp_path)
    (launch,) = launched(env)
    assert (done.returncode, launch["code"], launch["ranks"]) == (0, 0, 16), f"{launch['said']}{done.stderr}"
    words = " ".join(launch["argv"])
    assert "--rdzv-endpoint localhost:20042 --rdzv-id 42.0 --rdzv-conf is_host=1" in words
    assert f"--load {env['OUT']}/checkpoints" in words
    assert requests(env) == ""


@pytest.mark.parametrize(
    ("before", "after", "said", "code", "requeued"),
    [
        (0, 7, "  exitcode  : 75 (pid: 3)", 1, True),
        (7, 9, "", 75, True),
        (7, 7, "", 75, False),
        (0, 7, "  exitcode  : 5 (pid: 3)", 1, False),
        (0, 7, "", 0, False),
    ],
)
def test_slurm_job_requeues(
    before: int, after: int, said: str, code: int, requeued: bool, env: dict[str, str], tmp_path: Path
) -> None:
    if before:
        checkpointed(env, before)
    latest = f"{env['OUT']}/checkpoints/latest_checkpointed_iteration.txt"
    fake = f"#!/bin/sh\nmkdir -p {env['OUT']}/checkpoints\necho {after} >{latest}\necho '{said}'\nexit {code}\n"
    (tmp_path / "stubs/torchrun").write_text(fake)
    done = bash(SBATCH, job(env), cwd=tmp_path)
    assert requests(env) == ("requeue 42\n" if requeued else ""), done.stdout + done.stderr
    assert (done.returncode == 0) is (requeued or code == 0)


def test_slurm_job_asks_for_a_save_when_time_is_up(env: dict[str, str], tmp_path: Path) -> None:
    latest = f"{env['OUT']}/checkpoints/latest_checkpointed_iteration.txt"
    fake = f"""#!/usr/bin/env bash
mkdir -p {env["OUT"]}/checkpoints
trap 'echo 8 >{latest}; exit 1' TERM
kill -TERM "$PPID"
for i in $(seq 100); do sleep 0.1; done
"""
    (tmp_path / "stubs/torchrun").write_text(fake)
    done = bash(SBATCH, job(env) | {"TMPDIR": str(tmp_path)}, cwd=tmp_path)
    assert "asking all ranks to save" in done.stdout, done.stdout + done.stderr
    assert requests(env) == "requeue 42\n", done.stdout + done.stderr
