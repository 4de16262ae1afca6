"""What the tool prints, with costs and bytes worked out by hand, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tools.show_schedule import main


def run(capsys: pytest.CaptureFixture[str], text: str) -> tuple[int, list[str], str]:
    code = main(text.split())
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_chart_and_table(capsys):
    code, lines, _ = run(capsys, "--pipeline-model-parallel-size 2 --num-microbatches 2")
    assert code == 0
    assert lines[:4] == [
        "1f1b: 2 stages, 2 micro-batches",
        "stage 0 |F0 F1 ......B0--- ...B1---",
        "stage 1 |...F0 B0--- F1 B1--- ......",
        "bubble 50% of the busiest stage's work; live micro-batches by stage: 2 1",
    ]
    assert [line.split() for line in lines[5:8]] == [
        ["stage", "idle", "live", "buffers", "sends", "receives"],
        ["0", "33.3%", "2", "1", "2", "2"],
        ["1", "33.3%", "1", "1", "2", "2"],
    ]


def test_bytes_on_the_wire(capsys):
    flags = "--num-virtual-stages-per-pipeline-rank 2 --num-microbatches 8 --seq-length 1024 --micro-batch-size 2"
    code, lines, _ = run(capsys, f"{flags} --hidden-size 256")
    assert code == 0
    assert lines[0] == "interleaved: 4 stages, 8 micro-batches, 2 chunks per stage"
    # 8 virtual stages: the ends of the model send one message less per micro-batch; 1024 * 2 * 256 * 4 bytes each.
    assert [line.split()[-3:] for line in lines if line[:5].strip().isdigit()] == [
        ["24", "24", f"{24 * 2097152:,}"],
        ["32", "32", f"{32 * 2097152:,}"],
        ["32", "32", f"{32 * 2097152:,}"],
        ["24", "24", f"{24 * 2097152:,}"],
    ]
    split = "--bf16 --context-parallel-size 2 --tensor-model-parallel-size 4"
    _, lines, _ = run(capsys, f"{flags} --hidden-size 256 {split}")
    assert lines[-1] == "a message of one rank has 524,288 bytes"
    _, lines, _ = run(capsys, f"{flags} --hidden-size 256 {split} --sequence-parallel")
    assert lines[-1] == "a message of one rank has 131,072 bytes"


def test_times_are_those_asked_for(capsys):
    flags = "--pipeline-schedule zbh1 --pipeline-model-parallel-size 3 --num-microbatches 6"
    # (p - 1)(F + I - W) = 2 (2 + 2 - 1) lost of 6 (2 + 3) that each stage works.
    _, lines, _ = run(capsys, f"{flags} --forward-time 2 --backward-time 3 --weight-time 1")
    assert lines[4].startswith("bubble 20% ")


def test_svg_is_written(tmp_path, capsys):
    file = tmp_path / "step.svg"
    code, lines, _ = run(capsys, f"--pipeline-schedule gpipe --svg {file}")
    assert code == 0
    assert lines[-1] == f"drawn into {file}"
    root = ET.parse(file).getroot()
    assert "gpipe: 4 stages, 8 micro-batches" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


REFUSED = {
    "--num-microbatches 10 --pipeline-schedule interleaved": ("--num-microbatches 10", "--num-microbatches 8 or 12"),
    "--num-microbatches 3 --pipeline-schedule interleaved": ("--num-microbatches 3", "--num-microbatches 4"),
    "--pipeline-schedule zbh1 --num-virtual-stages-per-pipeline-rank 2": ("virtual", "--pipeline-schedule interleaved"),
    "--pipeline-model-parallel-size 1 --num-virtual-stages-per-pipeline-rank 2": ("1 stage", "at least 2"),
    "--num-microbatches 0": ("--num-microbatches", "more than 0"),
    "--forward-time 0": ("--forward-time", "more than 0"),
    "--weight-time 1": ("--weight-time", "zbh1"),
    "--pipeline-schedule zbh1 --weight-time 2": ("--weight-time", "a part of --backward-time 2"),
    "--pipeline-schedule 1f1": ("--pipeline-schedule", "invalid choice"),
    "--seq-length 1024 --hidden-size 8": ("--micro-batch-size", "nothing"),
    "--seq-length 10 --hidden-size 8 --micro-batch-size 1 --context-parallel-size 4": ("10", "a multiple of 4"),
    "--bf16 --fp16": ("--fp16", "one of them"),
    "--svg /no/such/folder/step.svg": ("/no/such/folder/step.svg", "a file that can be written"),
    "--num-stages 4": ("--num-stages", "a flag listed by --help"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refusals(flags, capsys):
    code, _, err = run(capsys, flags)
    assert code == 2
    for words in REFUSED[flags]:
        assert words in err


def test_all_mistakes_at_once(capsys):
    code, _, err = run(capsys, "--num-microbatches 6 --pipeline-schedule interleaved --bf16 --fp16")
    assert code == 2
    assert "a multiple of the stages" in err and "one of them" in err


def test_as_a_program():
    tool = Path(__file__).parents[2] / "tools" / "show_schedule.py"
    done = subprocess.run([sys.executable, str(tool), "--num-microbatches", "-1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --num-microbatches")
    assert "Traceback" not in done.stderr
