"""AdamW against torch.optim.AdamW in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_ds.kernels.adamw import Hyper, Part
from megatron_ds.kernels.triton.adamw import adamw
from tests.kernels.triton.cases import DEVICE, INTERPRETED, close, normal

SCALE = 0.125
HYPER = Hyper(lr=3e-2, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-2)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9)], ids=str)
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_steps_of_several_parts(grads: torch.dtype, betas: tuple[float, float]) -> None:
    sizes, copies = (1, 7, 2053), (torch.bfloat16, None, torch.float16)
    masters = [normal(n) for n in sizes]
    models = [
        None if dtype is None else torch.zeros(n, dtype=dtype, device=DEVICE)
        for n, dtype in zip(sizes, copies, strict=True)
    ]
    moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in masters]
    wide = [m.double().requires_grad_() for m in masters]
    hyper = HYPER._replace(beta1=betas[0], beta2=betas[1])
    peer = torch.optim.AdamW(wide, hyper.lr, betas, hyper.eps, hyper.weight_decay)
    for step in (1, 2, 3):
        drawn = [normal(n, dtype=grads, seed=step) for n in sizes]
        for p, grad in zip(wide, drawn, strict=True):
            p.grad = grad.double() * SCALE
        peer.step()
        parts = [Part(p, g, m, v, c) for p, g, (m, v), c in zip(masters, drawn, moments, models, strict=True)]
        number, scale = (torch.tensor(float(x), device=DEVICE) for x in (step, SCALE))
        adamw(parts, number, scale, hyper)
        for p, (m, v), model, want in zip(masters, moments, models, wide, strict=True):
            state = peer.state[want]
            close(p, want.detach())
            close(m, state["exp_avg"])
            close(v, state["exp_avg_sq"])
            if model is not None:
                close(model, p.double())
                assert INTERPRETED or torch.equal(model, p.to(model.dtype))


def test_first_step_is_exact_where_beta_is_near_one() -> None:
    # Corrected moments of a first step are g and g^2: it moves by lr whatever the betas.
    p, g = torch.zeros(3, device=DEVICE), torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    one = torch.ones((), device=DEVICE)
    moments = torch.zeros_like(p), torch.zeros_like(p)
    adamw([Part(p, g, *moments, None)], one, one, Hyper(1.0, 0.0, beta1=0.9, beta2=0.9999, eps=0.0))
    close(p, -g.double().sign())


def test_neighbours_in_a_flat_buffer_are_left_alone() -> None:
    flat = normal(5, 30)
    before = flat.clone()
    one = torch.ones((), device=DEVICE)
    master, grad, m, v, _ = (row[3:17] for row in flat)
    v.abs_()
    adamw([Part(master, grad, m, v, None), Part(*(flat[4, :0],) * 4, None)], one, one, HYPER)
    assert torch.equal(flat[:, :3], before[:, :3]) and torch.equal(flat[:, 17:], before[:, 17:])
    assert not torch.equal(master, before[0, 3:17])


def test_autograd_notices() -> None:
    master, grad, m, v = (normal(8, seed=seed).abs_() for seed in range(4))
    one, model = torch.ones((), device=DEVICE), normal(8).bfloat16().requires_grad_()
    kept = (model * model).sum()
    adamw([Part(master, grad, m, v, model.detach())], one, one, HYPER)
    with pytest.raises(RuntimeError, match="inplace operation"):
        kept.backward()


@pytest.mark.parametrize("model", [None, torch.bfloat16], ids=["alone", "bf16"])
def test_a_scale_of_zero_changes_nothing(model: torch.dtype | None) -> None:
    master, m, v = normal(2053), normal(2053, seed=1), normal(2053, seed=2).abs_()
    kept = [master, m, v] + ([] if model is None else [master.to(model)])
    before = [t.clone() for t in kept]
    grad, zero = torch.full_like(master, torch.nan), torch.zeros((), device=DEVICE)
    adamw([Part(master, grad, m, v, None if model is None else kept[3])], zero, zero, HYPER)
    assert all(torch.equal(now, then) for now, then in zip(kept, before, strict=True))
