"""Measured rows as Markdown tables, and the roofline of a machine.

    python benchmarks/report.py                               tables on standard output, docs/roofline.svg
    python benchmarks/report.py --dtype bf16 --threads 1 --device cpu FILE ...

Of rows that measured the same thing the last one counts. In the picture a dot is an operation, a product or a whole
step: how many FLOPs it does for each byte that it has to move, and how many GFLOP/s it reaches; above it are the
fastest copy and the fastest product that the machine was seen to do in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.roofline import Dot, draw

HOME = Path(__file__).resolve().parents[1]
SAME = (
    "benchmark", "workload", "configuration", "op", "shape", "dtype", "device", "threads", "our_flags", "micro",
    "model", "fp8",
)  # fmt: skip
Row = dict[str, Any]


def latest(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files, the last of each kind."""
    found: dict[str, Row] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = json.dumps([row.get(name) for name in SAME] + [hardware(row)])
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def hardware(row: Row) -> str:
    """The GPU, or the CPU and how many of its cores."""
    about = row.get("machine", {})
    return about["gpus"][0] if about.get("gpus") else f"{about.get('cpu', '?')}, {about.get('usable_cores', '?')} cores"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """One Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |"


def markdown(rows: list[Row]) -> str:
    """All tables, one for each machine and kind of benchmark."""
    lines: list[str] = []
    for kind, (title, make) in KINDS.items():
        for where in dict.fromkeys(hardware(row) for row in rows if row["benchmark"] == kind):
            some = [row for row in rows if row["benchmark"] == kind and hardware(row) == where]
            lines += [f"### {title}: {where}", "", *make(some), ""]
    return "\n".join(lines)


def _sides(rows: list[Row]) -> Iterator[str]:
    head = ("workload", "", "side", "tokens/s", "best", "peak MB", "ours over it", "of best matmul", "commit")

    def cells() -> Iterator[Sequence[object]]:
        for row in rows:
            what = row.get("configuration") or row["workload"]
            how = f"{row['dtype']}, {row.get('processes', 1)} x {row.get('threads', '?')}"
            for name, side in row["sides"].items():
                if "tokens_per_s" not in side:
                    yield what, how, name, side.get("failed") or side.get("left_out"), *[None] * 4, row["commit"]
                    continue
                peak = side["peak_mb"]
                share = side.get("matmul_share")
                ratio = side.get("ours_over_it")
                yield (
                    what, how, name, round(side["tokens_per_s"]), round(side["best_tokens_per_s"]),
                    max(peak) if isinstance(peak, list) else peak, f"{ratio:.2f}x" if ratio else None,
                    f"{share:.0%}" if share else None, row["commit"],
                )  # fmt: skip

    return table(head, cells())


def _kernels(rows: list[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    head = ("operation", "shape", "", *(f"{name}, us" for name in names))

    def cell(side: Row | None) -> str | None:
        if side is None or "failed" in side:
            return None if side is None else "failed"
        return " / ".join(f"{side[kind]:.0f}" for kind in ("forward_us", "both_us") if kind in side)

    cells = (
        (
            row["op"],
            row["shape"],
            f"{row['dtype']} x {row['threads']}",
            *(cell(row["sides"].get(name)) for name in names),
        )
        for row in rows
    )
    return table(head, cells)


def _gpu(rows: list[Row]) -> Iterator[str]:
    head = ("workload", "side", "micro", "tokens/s", "MFU", "of best matmul", "peak GiB", "planned GiB", "commit")

    def cells() -> Iterator[Sequence[object]]:
        for row in rows:
            for name, side in row["sides"].items():
                for micro, found in side["by_micro"].items():
                    if "tokens_per_s" not in found:
                        yield row["workload"], name, micro, found["failed"], *[None] * 4, row["commit"]
                        continue
                    yield (
                        row["workload"], name, micro, round(found["tokens_per_s"]), f"{found['mfu']:.1%}",
                        f"{found['matmul_share']:.1%}", f"{found['peak_gib']:.1f}", found.get("planned_gib"),
                        row["commit"],
                    )  # fmt: skip

    return table(head, cells())


KINDS = {
    "train_step": ("One process", _sides),
    "parallel": ("Two processes", _sides),
    "gpu_step": ("One GPU", _gpu),
    "kernels": ("Operations, forward / with backward", _kernels),
}


def dots(rows: list[Row], dtype: str, device: str, threads: int) -> Iterator[Dot]:
    """Of each operation and step, what ours reaches at best, and the best of the others."""
    for row in rows:
        if row["dtype"] != dtype or row.get("device", "cpu") != device or row.get("threads") != threads:
            continue
        if row["benchmark"] == "kernels":
            seconds = {n: side["forward_us"] / 1e6 for n, side in row["sides"].items() if "forward_us" in side}
            rates = {name: row["flops"] / t / 1e9 for name, t in seconds.items()}
            yield from _pair(row["op"].replace(", causal", ""), row["flops"] / row["bytes"][0], rates)
        elif row["benchmark"] == "train_step" and "least_bytes_per_step" in row:
            from benchmarks.workloads import WORKLOADS

            flops = row["flops_per_token"]
            rates = {n: s["tokens_per_s"] * flops / 1e9 for n, s in row["sides"].items() if "tokens_per_s" in s}
            steps = WORKLOADS[row["workload"]].tokens_per_step
            yield from _pair(f"step of {row['workload']}", flops * steps / row["least_bytes_per_step"], rates)


def _pair(name: str, intensity: float, rates: dict[str, float]) -> Iterator[Dot]:
    ours = [rate for side, rate in rates.items() if side.startswith("ours")]
    others = [rate for side, rate in rates.items() if not side.startswith("ours")]
    if ours:
        yield Dot(name, intensity, max(ours), max(others, default=None))


def roofs(rows: list[Row], dtype: str, device: str, threads: int) -> tuple[float, float] | None:
    """GFLOP/s of the best product and GB/s of the best copy that rows of this kind saw."""
    fitting = [
        row for row in rows
        if row["dtype"] == dtype and row.get("device", "cpu") == device and row.get("threads") == threads
        and "copy_gb_per_s" in row
    ]  # fmt: skip
    if not fitting:
        return None
    best = max(row["best_matmul"][dtype]["best_gflops"] for row in fitting)
    return best, max(row["copy_gb_per_s"] for row in fitting)


def main(argv: list[str] | None = None) -> int:
    """Print the tables, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="default: benchmarks/results/*.jsonl")
    parser.add_argument("--svg", type=Path, default=HOME / "docs" / "roofline.svg")
    parser.add_argument("--dtype", default="bf16", help="of the picture, as the next ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    rows = latest(options.files or sorted((HOME / "benchmarks" / "results").glob("*.jsonl")))
    print(markdown(rows))
    shown = options.dtype, options.device, options.threads
    limits, found = roofs([row for row in rows if "dtype" in row], *shown), None
    if limits:
        chosen = [row for row in rows if "dtype" in row and "copy_gb_per_s" in row]
        found = list(dots(chosen, *shown))
        where = hardware(chosen[-1])
        title = f"{where}: {options.dtype}" + (f", {options.threads} thread" if options.device == "cpu" else "")
        options.svg.write_text(draw(found, *limits, title + "s" * (options.device == "cpu" and options.threads > 1)))
    said = f"{options.svg}: {len(found)} dots" if found else f"no rows with roofs for {shown}: {options.svg} left alone"
    print(said, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
