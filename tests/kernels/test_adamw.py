"""AdamW on flat pieces beside torch.optim.AdamW in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels import adamw
from megatron_ds.kernels.adamw import AdamW, Hyper, Part
from tests.kernels.exact import normal

Tensor = torch.Tensor
BOTH = pytest.mark.parametrize("kernel", [adamw.reference, adamw.fused], ids=["reference", "fused"])
SIZES = (1, 7, 64, 1000)
HYPER = Hyper(lr=3e-2, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-6)
STEPS = 20


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "BLOCK", 64)


def part_of(start: Tensor, model: torch.dtype | None, grad: torch.dtype = torch.float32) -> Part:
    master = start.float()
    copy = None if model is None else torch.full_like(master, torch.nan, dtype=model)
    return Part(master, torch.zeros_like(master, dtype=grad), torch.zeros_like(master), torch.zeros_like(master), copy)


@BOTH
@pytest.mark.parametrize("model", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1 / 65536])
def test_twenty_steps(kernel: AdamW, model: torch.dtype | None, grad: torch.dtype, scale: float) -> None:
    parts = [part_of(normal(n), model, grad) for n in SIZES]
    exact = [torch.nn.Parameter(part.master.double()) for part in parts]
    peer = torch.optim.AdamW(exact, HYPER.lr, (HYPER.beta1, HYPER.beta2), HYPER.eps, HYPER.weight_decay)
    factor = torch.tensor(scale)
    for step in range(1, STEPS + 1):
        for i, (part, parameter) in enumerate(zip(parts, exact, strict=True)):
            part.grad.copy_(normal(len(part.master), seed=100 * step + i) / scale)
            parameter.grad = part.grad.double() * factor.double()
        kernel(parts, torch.tensor(float(step)), factor, HYPER)
        peer.step()
    for part, parameter in zip(parts, exact, strict=True):
        state = peer.state[parameter]
        for found, expected in (
            (part.master, parameter),
            (part.exp_avg, state["exp_avg"]),
            (part.exp_avg_sq, state["exp_avg_sq"]),
        ):
            assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-6)
        if part.model is not None:
            assert part.model.dtype == model and torch.equal(part.model, part.master.to(model))


@BOTH
@pytest.mark.parametrize("bad", [1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("model", [None, torch.bfloat16], ids=str)
def test_a_scale_of_nought_changes_nothing(kernel: AdamW, bad: float, model: torch.dtype | None) -> None:
    parts = [part_of(normal(n), model) for n in SIZES]
    for part in parts:
        part.grad.copy_(normal(len(part.master)))
    kernel(parts, torch.tensor(1.0), torch.tensor(1.0), HYPER)
    before = [[None if t is None else t.clone() for t in part] for part in parts]
    for part in parts:
        part.grad.fill_(bad)
    kernel(parts, torch.tensor(2.0), torch.tensor(0.0), HYPER)
    for part, (master, _, exp_avg, exp_avg_sq, copy) in zip(parts, before, strict=True):
        assert torch.equal(part.master, master)
        assert torch.equal(part.exp_avg, exp_avg) and torch.equal(part.exp_avg_sq, exp_avg_sq)
        assert part.model is None or torch.equal(part.model, copy)


@BOTH
def test_slices_of_one_buffer(kernel: AdamW) -> None:
    """What lies beside a part stays as it was, and cutting changes nothing."""
    buffers = [torch.full((300,), 5.0) for _ in range(4)]
    whole = part_of(normal(200), None)
    part = Part(*(buffer[50:250] for buffer in buffers), None)
    for mine, theirs in zip(part[:4], whole[:4], strict=True):
        mine.copy_(theirs)
    for one in (part, whole):
        one.grad.copy_(normal(200, seed=9))
        kernel([one], torch.tensor(1.0), torch.tensor(1.0), HYPER)
    assert torch.equal(part.master, whole.master)
    assert all(bool((buffer[:50] == 5).all()) and bool((buffer[250:] == 5).all()) for buffer in buffers)


@BOTH
def test_nothing_to_do(kernel: AdamW) -> None:
    kernel([], torch.tensor(1.0), torch.tensor(1.0), HYPER)
    for model in (torch.bfloat16, None):
        kernel([part_of(normal(0), model)], torch.tensor(1.0), torch.tensor(1.0), HYPER)


def test_beside_a_cpu_all_parts_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for gradients in bf16, whose copies in fp32 are not all to be there at once."""
    updated: list[int] = []
    copied: list[int] = []

    def update(masters: list[Tensor], *lists: list[Tensor], **options: object) -> None:
        assert {len(one) for one in lists if one} == {len(masters)}
        assert all(t.dtype == torch.float32 for one in (masters, *lists) for t in one)
        updated.append(len(masters))

    monkeypatch.setattr(torch, "_fused_adamw_", update)
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copied.append(len(list(zip(to, of, strict=True)))))
    models = (torch.bfloat16, None, torch.float16, torch.bfloat16)
    parts = [part_of(torch.empty(n, device="meta"), model) for n, model in zip(SIZES, models, strict=True)]
    scalar = torch.empty((), device="meta")
    adamw.fused(parts, scalar, scalar, HYPER)
    assert (updated, copied) == ([4], [3])
    for narrow in (1, 2):
        parts[narrow] = parts[narrow]._replace(grad=parts[narrow].grad.bfloat16())
    adamw.fused(parts, scalar, scalar, HYPER)
    assert (updated, copied) == ([4, 1, 1, 2], [3, 1, 2])
    adamw.fused([], scalar, scalar, HYPER)
    assert len(updated) == 4
