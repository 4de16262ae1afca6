"""Each operation of the package's table beside torch's own operators, as they are and compiled: microseconds and GB/s.

    python benchmarks/kernels.py --workload W2 --dtype bf16            on a CPU
    python benchmarks/kernels.py --workload G1.3B --device cuda        on a GPU

Prints one JSON row per operation, with every backend that runs here; the sides take turns. `gb_per_s` counts what an
operation cannot avoid: each input read once, each output written once. A side whose values differ from torch's in fp32
by more than rounding says so under `differs`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.kernel_tables import Table, tables
from benchmarks.peers_common import commit, last_line, versions, write_row
from benchmarks.workloads import BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY, WORKLOADS, Workload
from megatron_ds.kernels.adamw import Hyper, Part, reference
from megatron_ds.kernels.attention import Pattern
from megatron_ds.kernels.rope import rope_frequencies, rope_table

Function = Callable[..., Any]


class Op(NamedTuple):
    """An operation at one shape.

    inputs: those that require gradients are differentiated; without any, forward is all there is, in place perhaps.
    moved: bytes that a forward cannot avoid, and a backward. flops: of a forward. plain: what to compile, if not
    `torch`.
    """

    name: str
    shape: str
    inputs: tuple[Tensor, ...]
    ours: Callable[[Table], Function]
    torch: Function
    moved: tuple[int, int]
    flops: int
    plain: Function | None = None


class Maker:
    """Random tensors of one precision on one device."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        made = torch.randn(shape, device=self.device, generator=self.generator).to(dtype or self.dtype)
        return made.requires_grad_(grad)

    def integers(self, bound: int, *shape: int) -> Tensor:
        """Whole numbers below `bound`."""
        return torch.randint(bound, shape, device=self.device, generator=self.generator)


def _moved(inputs: Sequence[Tensor], output: Tensor) -> tuple[int, int]:
    """Of an elementwise operation: inputs in and output out; then inputs and gradient in, inputs' gradients out."""
    read = sum(t.nbytes for t in inputs)
    return read + output.nbytes, read + output.nbytes + sum(t.nbytes for t in inputs if t.requires_grad)


def operations(w: Workload, dtype: torch.dtype, device: str) -> list[Op]:
    """The table's operations at the shapes of one micro-batch of a workload."""
    make = Maker(dtype, device)
    return [*_elementwise(w, make), _attention(w, make), *_linear(w, make), _cross_entropy(w, make), _adamw(w, make)]


def _elementwise(w: Workload, make: Maker) -> list[Op]:
    s, b, h, f = w.seq, w.micro, w.hidden, w.ffn or 4 * w.hidden
    x, residual, weight, bias = make(s, b, h), make(s, b, h), make(h), make(h)
    wide, wide_bias, gated = make(s, b, f), make(f), make(s, b, 2 * f)
    out, narrow = torch.empty_like(x), torch.empty_like(wide)
    size = h // w.heads
    head = make(s, b, w.heads, size)
    positions = torch.arange(s, device=make.device)[:, None].expand(s, b)
    table = rope_table(positions, rope_frequencies(size, 10000.0).to(make.device), make.dtype)
    scores, elements = make(b, w.heads, s, s), x.numel()
    shape, wide_shape = f"{s}x{b}x{h}", f"{s}x{b}x{f}"

    def op(name: str, shape: str, inputs: tuple[Tensor, ...], ours: Any, own: Function, out: Tensor, flops: int) -> Op:
        return Op(name, shape, inputs, ours, own, _moved(inputs, out), flops)

    return [
        op("layer_norm", shape, (x, weight, bias), lambda t: lambda *i: t.kernels.layer_norm(*i, 1e-5),
           lambda x, weight, bias: F.layer_norm(x, (h,), weight, bias), out, 8 * elements),
        op("rms_norm", shape, (x, weight), lambda t: lambda x, weight: t.kernels.rms_norm(x, weight, None, 1e-6),
           lambda x, weight: F.rms_norm(x, (h,), weight, 1e-6), out, 4 * elements),
        op("gelu_tanh", wide_shape, (wide, wide_bias), lambda t: t.kernels.activations["gelu_tanh"],
           lambda x, bias: F.gelu(x + bias, approximate="tanh"), narrow, 10 * narrow.numel()),
        op("swiglu", f"{s}x{b}x{2 * f}", (gated,), lambda t: lambda x: t.kernels.activations["swiglu"](x, None),
           _swiglu, narrow, 6 * narrow.numel()),
        op("bias_dropout_add", shape, (x, bias, residual), lambda t: lambda *i: t.kernels.bias_dropout_add(*i, 0.0),
           lambda x, bias, residual: residual + (x + bias), out, 2 * elements),
        op("bias_dropout_add p=0.1", shape, (x, bias, residual),
           lambda t: lambda *i: t.kernels.bias_dropout_add(*i, 0.1),
           lambda x, bias, residual: residual + F.dropout(x + bias, 0.1), out, 4 * elements),
        op("rope", f"{s}x{b}x{w.heads}x{size}", (head, table), lambda t: t.kernels.rope, _rope, head, 3 * head.numel()),
        op("softmax", f"{b}x{w.heads}x{s}x{s}", (scores,), lambda t: lambda x: t.softmax(x, None, 0.1, True),
           _causal_softmax, scores, 5 * scores.numel()),
    ]  # fmt: skip


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _rope(x: Tensor, table: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * table[0] + torch.cat((-high, low), -1) * table[1]


def _causal_softmax(x: Tensor) -> Tensor:
    hidden = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return torch.softmax((x.float() * 0.1).masked_fill(hidden, -torch.inf), -1).to(x.dtype)


def _attention(w: Workload, make: Maker) -> Op:
    s, b, size = w.seq, w.micro, w.hidden // w.heads
    kv = w.kv_heads or w.heads
    inputs = make(s, b, w.heads, size), make(s, b, kv, size), make(s, b, kv, size)

    def own(*parts: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != w.heads)
        return y.permute(2, 0, 1, 3).flatten(2)

    return Op(
        "attention, causal", f"{s}x{b}x{w.heads}x{size}", inputs,
        lambda t: lambda q, k, v: t.kernels.attention(q, k, v, None, Pattern(), 0.0), own,
        _moved(inputs, inputs[0]), 4 * b * s * s * w.hidden,
    )  # fmt: skip


def _linear(w: Workload, make: Maker) -> list[Op]:
    n, h, f = w.seq * w.micro, w.hidden, w.ffn or 4 * w.hidden
    x, weight, grad = make(n, h, grad=False), make(f, h, grad=False), make(n, f, grad=False)
    total = make(f, h, grad=False, dtype=torch.float32)
    flops, shape = 2 * n * h * f, f"{n}x{h}x{f}"
    inner = x.nbytes + weight.nbytes + grad.nbytes

    def add(total: Tensor, grad: Tensor, x: Tensor) -> None:
        total.add_(torch.mm(grad.t(), x))

    return [
        Op("linear, forward", shape, (x, weight), lambda t: lambda x, weight: t.kernels.linear.forward(x, weight, None),
           F.linear, (inner, 0), flops),
        Op("linear, input's gradient", shape, (grad, weight), lambda t: t.kernels.linear.grad_input, torch.mm,
           (inner, 0), flops),
        Op("linear, weight's gradient added", shape, (total, grad, x),
           lambda t: lambda total, grad, x: t.kernels.linear.add_grad_weight(total, grad, x, 1), add,
           (x.nbytes + grad.nbytes + 2 * total.nbytes, 0), flops),
    ]  # fmt: skip


def _cross_entropy(w: Workload, make: Maker) -> Op:
    """Forward and backward at once: the package's halves share the logits' memory."""
    n, v = w.seq * w.micro, w.vocab
    logits, targets = make(n, v, grad=False), make.integers(v, n)
    upstream = torch.full((n,), 1 / n, device=make.device)

    def ours(t: Table) -> Function:
        def both(logits: Tensor, targets: Tensor) -> Tensor:
            log_sum, target = t.kernels.cross_entropy.statistics(logits, targets, v)
            t.kernels.cross_entropy.gradient(logits, targets, v, log_sum, log_sum, upstream)
            return (log_sum - target).mean()

        return both

    def own(logits: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = F.cross_entropy(leaf.float(), targets)
            torch.autograd.grad(loss, leaf)
        return loss.detach()

    return Op("cross_entropy, both", f"{n}x{v}", (logits, targets), ours, own, (3 * logits.nbytes, 0), 8 * n * v)


def _adamw(w: Workload, make: Maker) -> Op:
    """One layer's parameters: unscale, update, cast."""
    n = 12 * w.hidden * w.hidden
    wide = partial(make, n, grad=False, dtype=torch.float32)
    master, grad, exp_avg, exp_avg_sq = wide(), wide(), wide(), wide().square_()
    half = make.dtype != torch.float32
    model = master.to(make.dtype) if half else master
    step, scale = torch.ones((), device=make.device), torch.ones((), device=make.device)
    hyper = Hyper(LEARNING_RATE, WEIGHT_DECAY, *BETAS, EPS)

    def ours(t: Table) -> Function:
        def update(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor) -> None:
            t.kernels.adamw([Part(master, grad, exp_avg, exp_avg_sq, model if half else None)], step, scale, hyper)

        return update

    def formula(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor) -> None:
        reference([Part(master, grad, exp_avg, exp_avg_sq, model if half else None)], step, scale, hyper)

    def own(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model: Tensor) -> None:
        grad.mul_(scale)
        torch._fused_adamw_(
            [master], [grad], [exp_avg], [exp_avg_sq], [], [step], amsgrad=False, maximize=False, **hyper._asdict()
        )  # fmt: skip
        if half:
            model.copy_(master)

    inputs = master, grad, exp_avg, exp_avg_sq, model
    moved = 7 * master.nbytes + (model.nbytes if half else 0)
    return Op("adamw", f"{n}", inputs, ours, own, (moved, 0), 12 * n, formula)


class Timed:
    """One side of an operation, with its own copies of the inputs."""

    def __init__(self, op: Op, function: Function, device: str, wide: bool = False):
        self.op, self.function = op, function
        copies = (t.detach().clone() for t in op.inputs)
        if wide:
            copies = (t.float() if t.is_floating_point() else t for t in copies)
        self.inputs = tuple(c.requires_grad_(t.requires_grad) for c, t in zip(copies, op.inputs, strict=True))
        self.leaves = [t for t in self.inputs if t.requires_grad]
        self.times: dict[str, list[float]] = {"forward": [], "both": []}
        self.failed: str | None = None
        self.kinds = {"forward": machine._timer(self.forward, device)}
        if self.leaves:
            self.kinds["both"] = machine._timer(self.both, device)

    def forward(self) -> Any:
        """Without gradients."""
        with torch.no_grad():
            return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        """With the gradients of all inputs that have one; the upstream gradient is the output itself."""
        out = self.function(*self.inputs)
        return out.detach(), *torch.autograd.grad(out, self.leaves, out.detach())

    def first(self) -> list[Tensor]:
        """The results, from fresh inputs; compiles what has to be compiled."""
        found = self.both() if self.leaves else self.forward()
        results = list(found) if isinstance(found, tuple) else [found] if found is not None else []
        return [t.detach().clone() for t in (results or [self.inputs[0]])]

    def once(self, record: bool) -> None:
        """Time each kind once."""
        for kind, timer in self.kinds.items():
            seconds = timer()
            if record:
                self.times[kind].append(seconds)


def measure(op: Op, sides: dict[str, Function], device: str, seconds: float) -> dict[str, Any]:
    """All sides in turn for about so long."""
    expected = Timed(op, op.torch, device, wide=True).first()
    timed = {name: Timed(op, function, device) for name, function in sides.items()}
    rows: dict[str, Any] = {}
    for name, side in timed.items():
        try:
            found = side.first()
            side.once(record=False)
        except Exception as error:
            side.failed = last_line(error)
            rows[name] = {"failed": side.failed}
            continue
        rows[name] = {}
        worst = _difference(found, expected) if "p=0" not in op.name else 0.0
        if worst > 20 * max(torch.finfo(t.dtype).eps for t in op.inputs if t.is_floating_point()):
            rows[name]["differs"] = float(f"{worst:.1e}")
    running = [side for side in timed.values() if not side.failed]
    stop, rounds = time.perf_counter() + seconds, 0
    while running and (rounds < 5 or time.perf_counter() < stop):
        rounds += 1
        for side in running:
            side.once(record=True)
    for name, side in timed.items():
        rows[name] |= _summary(op, side)
    return {"rounds": rounds, "sides": rows}


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of any result, in the sense of norms."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in pairs)


def _summary(op: Op, side: Timed) -> dict[str, float]:
    out: dict[str, float] = {}
    for kind, moved in (("forward", op.moved[0]), ("both", sum(op.moved))):
        if side.times[kind]:
            seconds = statistics.median(side.times[kind])
            out |= {f"{kind}_us": round(seconds * 1e6, 1), f"{kind}_gb_per_s": round(moved / seconds / 1e9, 2)}
    return out


def main(argv: list[str] | None = None) -> int:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W2", help="whose shapes")
    parser.add_argument("--dtype", choices=machine.DTYPES, default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each operation")
    parser.add_argument("--only", default="", help="operations whose names begin so, comma-separated")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--output", type=Path, help="append the rows to this file")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    workload, dtype = WORKLOADS[options.workload], machine.DTYPES[options.dtype]
    chosen = tables(torch.device(options.device), dtype)
    about = {
        "benchmark": "kernels", "commit": commit(), "command": " ".join(["python", *sys.argv]),
        "workload": options.workload, "dtype": options.dtype, "device": options.device, "threads": options.threads,
        **machine.limits(options.device, min(1.0, options.seconds)),
    }  # fmt: skip
    for op in operations(workload, dtype, options.device):
        if not op.name.startswith(tuple(options.only.split(","))):
            continue
        sides: dict[str, Function] = {"torch": op.torch}
        if not options.no_compile:
            sides["torch compiled"] = torch.compile(op.plain or op.torch, dynamic=False)
        sides |= {f"ours ({name})": op.ours(table) for name, table in chosen.items()}
        row = {
            **about, "op": op.name, "shape": op.shape, "bytes": op.moved, "flops": op.flops,
            **measure(op, sides, options.device, options.seconds),
            "versions": versions(), "machine": machine.describe(),
        }  # fmt: skip
        write_row(row, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
