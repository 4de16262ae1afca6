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

from benchmarks.machine import best_gflops
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


def drawn(rows: list[Row], dtype: str, device: str, threads: int) -> list[Row]:
    """Rows for a picture: those with roofs, of the machine that was measured last."""
    fitting = [
        row for row in rows
        if "copy_gb_per_s" in row and row.get("dtype") == dtype
        and row.get("device", "cpu") == device and row.get("threads") == threads
    ]  # fmt: skip
    return [row for row in fitting if hardware(row) == hardware(fitting[-1])]


def dots(rows: list[Row]) -> Iterator[Dot]:
    """Of each operation and step, what ours reaches at best, and the best of the others."""
    for row in rows:
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


def roofs(rows: list[Row], dtype: str) -> tuple[float, float]:
    """GFLOP/s of the best product and GB/s of the best copy that the rows saw."""
    best = max(best_gflops(row["best_matmul"], dtype) for row in rows)
    return best, max(row["copy_gb_per_s"] for row in rows)


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
    chosen = drawn(rows, *shown)
    if chosen:
        found = list(dots(chosen))
        title = f"{hardware(chosen[-1])}: {options.dtype}"
        if options.device == "cpu":
            title += f", {options.threads} thread{'s' * (options.threads > 1)}"
        options.svg.write_text(draw(found, *roofs(chosen, options.dtype), title))
        print(f"{options.svg}: {len(found)} dots", file=sys.stderr)
    else:
        print(f"no rows with roofs for {shown}: {options.svg} left alone", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
