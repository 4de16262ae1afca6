"""Rows become tables and a picture."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import machine, report
from benchmarks.roofline import HEIGHT, Dot, Scale, draw

ABOUT: dict[str, Any] = {
    "dtype": "bf16", "device": "cpu", "threads": 1, "commit": "abc", "copy_gb_per_s": 10.0,
    "best_matmul": {"bf16": {"best_gflops": 100.0}}, "machine": {"cpu": "X", "usable_cores": 2, "gpus": []},
}  # fmt: skip


def step(rate: float, **more: Any) -> dict[str, Any]:
    side = {"tokens_per_s": rate, "best_tokens_per_s": rate, "peak_mb": 7, "matmul_share": 0.5}
    sides = {"ours": side, "torch": {**side, "tokens_per_s": rate / 2, "ours_over_it": 2.0}, "nanoGPT": {"failed": "?"}}
    work = {"flops_per_token": 10**6, "least_bytes_per_step": 10**6}
    return {"benchmark": "train_step", "workload": "tiny", **ABOUT, **work, "sides": sides, **more}


def kernel(name: str) -> dict[str, Any]:
    sides = {"torch": {"forward_us": 4.0}, "ours (auto)": {"forward_us": 2.0, "both_us": 5.0}}
    return {
        "benchmark": "kernels",
        "op": name,
        "shape": "2x3",
        "bytes": [100, 100],
        "flops": 50,
        **ABOUT,
        "sides": sides,
    }


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (step(111.0), kernel("norm"), kernel("rope"), step(222.0)))) + "\n")
    return path


def test_the_last_row_of_a_kind_counts(rows: Path) -> None:
    text = report.markdown(report.latest([rows]))
    assert "| tiny | bf16, 1 x 1 | torch | 111 | 222 | 7 | 2.00x | 50% | abc |" in text
    assert "| ours | 222 |" in text and "| ours | 111 |" not in text
    assert "| nanoGPT | ? |" in text and "| norm | 2x3 | bf16 x 1 | 4 | 2 / 5 |" in text


def test_picture(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "roofline.svg"
    assert report.main([str(rows), "--svg", str(picture)]) == 0
    assert "3 dots" in capsys.readouterr().err
    words = "".join(ET.parse(picture).getroot().itertext())
    assert "norm: 0.5 FLOP/byte, ours 0.025 GFLOP/s, others 0.0125" in words
    assert "best product 100 GFLOP/s" in words and "best copy 10.0 GB/s" in words and "step of tiny" in words


def test_a_picture_is_of_one_machine_with_the_best_product_of_any_precision_that_will_do(tmp_path: Path) -> None:
    limits = {"bf16": {"best_gflops": 50.0}, "fp32": {"best_gflops": 80.0}}
    other = {"machine": {**ABOUT["machine"], "cpu": "Y"}, "best_matmul": limits, "copy_gb_per_s": 7.0}
    path, picture = tmp_path / "rows.jsonl", tmp_path / "roofline.svg"
    path.write_text("\n".join(map(json.dumps, (step(111.0), kernel("norm"), step(222.0, **other)))))
    assert report.main([str(path), "--svg", str(picture)]) == 0
    words = "".join(ET.parse(picture).getroot().itertext())
    assert "of Y, 2 cores" in words and "norm" not in words
    assert "best product 80 GFLOP/s" in words and "best copy 7.0 GB/s" in words
    assert machine.best_gflops(limits, "fp32") == 80.0 and machine.best_gflops({"bf16": limits["bf16"]}, "bf16") == 50.0


def test_without_roofs_there_is_no_picture(tmp_path: Path) -> None:
    path, picture = tmp_path / "rows.jsonl", tmp_path / "roofline.svg"
    path.write_text(json.dumps({k: v for k, v in step(1.0).items() if k != "copy_gb_per_s"}))
    report.main([str(path), "--svg", str(picture)])
    assert not picture.exists()


def test_scale_is_logarithmic() -> None:
    scale = Scale([Dot("a", 0.2, 3.0, None), Dot("b", 300.0, 30.0, 40.0)], 100.0, 10.0)
    (x1, y1), (x2, y2), (x3, y3) = (scale.at(10.0**n, 10.0**n) for n in (0, 1, 2))
    assert x2 - x1 == pytest.approx(x3 - x2) and y2 - y1 == pytest.approx(y3 - y2)
    assert 0 < y3 < y1 < HEIGHT


def test_names_do_not_cover_each_other() -> None:
    dots = [Dot(f"operation {n}", 1.0, 5.0 + n / 100, None) for n in range(8)]
    root = ET.fromstring(draw(dots, 100.0, 10.0, "X"))
    places = sorted(
        float(t.attrib["y"]) for t in root.iter("{http://www.w3.org/2000/svg}text") if "operation" in (t.text or "")
    )
    assert len(places) == 8 and all(b - a >= 10 for a, b in itertools.pairwise(places))


def test_limits_of_this_machine() -> None:
    copy = machine.best_copy(seconds=0.0, mib=4)
    assert math.isfinite(copy) and copy > 0
