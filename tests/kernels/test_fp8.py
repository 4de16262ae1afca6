"""FP8 products against fp64, against torchao's linear layer, and at the edges of what FP8 can hold."""

from __future__ import annotations

import gc
import shutil
import weakref
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ds.kernels import fp8, products
from megatron_ds.kernels.fp8 import E4M3, E5M2, RECIPES, cast, cast_both_ways, fp8_products, multiply, refuses
from megatron_ds.kernels.products import Products

Tensor = torch.Tensor
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MANTISSA_BITS = {E4M3: 3, E5M2: 2}
INF, NAN = float("inf"), float("nan")


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor


def case(n: int = 48, i: int = 80, o: int = 32, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Operands as training has them: gradients are small, some columns are large."""
    generator = torch.Generator().manual_seed(n + i + o)
    x, weight, bias, grad = (torch.randn(s, generator=generator) for s in ((n, i), (o, i), (o,), (n, o)))
    x[:, 3] *= 20
    return Case(*(t.to(dtype) for t in (x, weight * 0.02, bias, grad * 1e-3)))


def built(format_: str = "hybrid", recipe: str = "tensorwise", plain: Products = products.REFERENCE) -> Products:
    return fp8_products(format_, recipe, plain, CPU)


def all_products(by: Products, c: Case) -> dict[str, Tensor]:
    total = torch.full(c.weight.shape, 0.5)
    by.add_grad_weight(total, c.grad, c.x, 1)
    return {
        "y": by.forward(c.x, c.weight, c.bias),
        "dx": by.grad_input(c.grad, c.weight),
        "dw": by.grad_weight(c.grad, c.x),
        "sum of dw": total,
    }


def exact(c: Case) -> dict[str, Tensor]:
    x, weight, bias, grad = (t.double() for t in c)
    dw = torch.einsum("no,ni->oi", grad, x)
    y = torch.einsum("ni,oi->no", x, weight) + bias
    return {"y": y, "dx": torch.einsum("no,oi->ni", grad, weight), "dw": dw, "sum of dw": 0.5 + dw}


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("format_", fp8.GRADIENTS)
def test_products_are_fp64s_within_the_digits_of_fp8(format_: str, recipe: str, dtype: torch.dtype) -> None:
    c = case(dtype=dtype)
    expected = exact(c)
    for name, found in all_products(built(format_, recipe), c).items():
        assert found.dtype == (torch.float32 if name == "sum of dw" else dtype)
        # Of independent errors; uniform in half a step they would be sqrt(3) smaller.
        digits = [E4M3, E4M3 if name == "y" else fp8.GRADIENTS[format_]]
        bound = sum(4.0 ** -(MANTISSA_BITS[d] + 1) for d in digits) ** 0.5
        scale = expected["dw"] if name == "sum of dw" else expected[name]
        error = rms(found.double() - expected[name]) / rms(scale)
        assert bound / 8 < error < bound, f"{name}: {error:.4f}, bound {bound:.4f}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_bits_as_torchaos_linear(recipe: str) -> None:
    pytest.importorskip("torchao.float8", exc_type=ImportError)
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    c = case()
    linear = torch.nn.Linear(80, 32, bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(c.weight)
    theirs = Float8Linear.from_float(linear, Float8LinearConfig.from_recipe_name(recipe))
    x = c.x.clone().requires_grad_()
    y = theirs(x)
    y.backward(c.grad)
    ours = built("hybrid" if recipe == "tensorwise" else "e4m3", recipe)
    assert torch.equal(ours.forward(c.x, c.weight, None), y)
    assert torch.equal(ours.grad_input(c.grad, c.weight), x.grad)
    assert torch.equal(ours.grad_weight(c.grad, c.x), linear.weight.grad)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_a_cast_uses_the_whole_range_and_keeps_its_digits(by_row: bool, dtype: torch.dtype) -> None:
    x = case().x.t()
    values, factor = cast(x, dtype, by_row)
    assert values.is_contiguous() and values.shape == x.shape and factor.shape == ((len(x), 1) if by_row else ())
    largest = values.double().abs().amax(1) if by_row else values.double().abs().max()
    lowest = 0.5 if by_row else 1.0
    assert (largest >= lowest * torch.finfo(dtype).max).all() and (largest <= torch.finfo(dtype).max).all()
    if by_row:
        assert torch.equal(torch.frexp(factor).mantissa, torch.full_like(factor, 0.5))
    back = values.double() * factor.double()
    normal = values.double().abs() >= torch.finfo(dtype).smallest_normal
    assert ((back - x).abs() <= 2.0 ** -(MANTISSA_BITS[dtype] + 1) * x.abs().double())[normal].all()
    assert normal.double().mean() > 0.9


@pytest.mark.parametrize("by_row", [False, True])
def test_both_ways_is_twice_one_way(by_row: bool) -> None:
    x = case().x
    for found, t in zip(cast_both_ways(x, E4M3, by_row), (x, x.t()), strict=True):
        expected = cast(t, E4M3, by_row)
        assert found.values.is_contiguous() and torch.equal(found.values.float(), expected.values.float())
        assert torch.equal(found.factor, expected.factor)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_stays_so(recipe: str, bad: float) -> None:
    for field in ("x", "weight", "grad"):
        c = case()
        getattr(c, field)[5, 7] = bad
        reached = {"x": ("y", "dw"), "weight": ("y", "dx"), "grad": ("dx", "dw")}[field]
        for name, found in all_products(built("hybrid", recipe), c).items():
            finite = bool(found.isfinite().all())
            assert finite == (name.removeprefix("sum of ") not in reached), f"{field} -> {name}"
        values, factor = cast(getattr(c, field), E4M3, recipe == "rowwise")
        assert values.float()[5, 7].isnan() and not factor.expand(len(values), 1)[5].isfinite()
        if recipe == "rowwise" and field == "x":
            bad_rows = ~built("hybrid", recipe).forward(c.x, c.weight, None).isfinite()
            assert bad_rows[5].all() and bad_rows.sum() == bad_rows.shape[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_extremes_of_size(recipe: str) -> None:
    p = built("hybrid", recipe)
    c = case()
    zeros = torch.zeros_like(c.x)
    assert not p.forward(zeros, c.weight, None).any() and not p.grad_weight(c.grad, zeros).any()
    zeros[2, 2] = 1.0
    assert p.forward(zeros, c.weight, None).isfinite().all()
    for size in (1e-25, 1e25):
        found, expected = p.grad_input(c.grad * size, c.weight), exact(c)["dx"] * size
        assert rms(found.double() - expected) < 0.08 * rms(expected)


@pytest.mark.parametrize("by_row", [False, True])
def test_the_scaled_product_is_summed_in_fp32(by_row: bool) -> None:
    c = case()
    left, right = cast(c.grad.t(), E5M2, by_row), cast(c.x.t(), E4M3, by_row)
    expected = (left.values.double() * left.factor) @ (right.values.double() * right.factor).t()
    product = multiply(left, right, torch.float32)
    assert rms(product - expected) < (2e-3 if by_row else 1e-6) * rms(expected)  # by rows it comes rounded to bf16
    total = torch.full_like(product, 0.5)
    by = built("hybrid", "rowwise" if by_row else "tensorwise")
    by.add_grad_weight(total, c.grad, c.x, 1)
    assert torch.equal(total, 0.5 + product)
    by.add_grad_weight(total.fill_(NAN), c.grad, c.x, 0)
    assert torch.equal(total, product)


def test_operands_may_be_views() -> None:
    c = case(dtype=torch.float32)
    odd = Case(*(t.t().contiguous().t() if t.dim() == 2 else t for t in c))
    assert not odd.x.is_contiguous()
    for recipe in RECIPES:
        found, expected = (all_products(built("e4m3", recipe), each) for each in (odd, c))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("n", "i", "o", "left"),
    [
        (48, 80, 32, set()),
        (47, 80, 32, {"dw", "sum"}),
        (48, 81, 32, {"y", "dx", "dw", "sum"}),
        (48, 80, 30, {"y", "dx"}),
    ],
)
def test_shapes_that_are_left_to_the_plain_products(n: int, i: int, o: int, left: set[str]) -> None:
    asked: set[str] = set()

    def noting(name: str) -> object:
        function = {"y": "forward", "dx": "grad_input", "dw": "grad_weight", "sum": "add_grad_weight"}[name]
        return lambda *operands: asked.add(name) or getattr(products.REFERENCE, function)(*operands)

    c = case(n, i, o)
    found = all_products(built(plain=Products(*map(noting, ("y", "dx", "dw", "sum")))), c)
    assert asked == left
    for name, expected in exact(c).items():
        assert rms(found[name].double() - expected) < 0.08 * rms(expected)


def test_refusals_say_why() -> None:
    assert refuses((7, 64, 32)) is None
    assert "(40)" in str(refuses((16, 40, 32))) and "16" in str(refuses((16, 40, 32)))
    assert "empty" in str(refuses((0, 16, 16)))


def test_the_cast_gradient_is_kept_for_the_weights_no_longer_than_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    casts: list[tuple[int, ...]] = []

    def noting(x: Tensor, *how: object) -> fp8.Operand:
        casts.append(tuple(x.shape))
        return cast(x, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8, "cast", noting)
    p, c = built(), case()
    expected = p.grad_weight(c.grad, c.x)
    casts.clear()
    p.grad_input(c.grad, c.weight)
    assert torch.equal(p.grad_weight(c.grad, c.x), expected)
    assert casts == [(48, 32), (80, 32), (80, 48)]  # the gradient once
    p.grad_input(c.grad, c.weight)
    c.grad.mul_(2)  # written since
    assert torch.equal(p.grad_weight(c.grad, c.x), 2 * expected)
    grad = c.grad.clone()
    p.grad_input(grad, c.weight)
    kept = p.grad_input.__self__.kept  # type: ignore[attr-defined]
    copy = weakref.ref(kept.transposed.values)
    del grad
    gc.collect()
    assert copy() is None and kept.transposed is None


def test_shapes_without_values() -> None:
    with FakeTensorMode():
        for recipe in RECIPES:
            found = all_products(built("hybrid", recipe), Case(*map(torch.empty_like, case())))
            assert {name: tuple(t.shape) for name, t in found.items()} == {
                "y": (48, 32), "dx": (48, 80), "dw": (32, 80), "sum of dw": (32, 80)
            }  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_casts_give_the_same_bits(backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    compiled = torch.compile(cast_both_ways, backend=backend, dynamic=True, fullgraph=True)
    for shape in ((48, 80), (80, 32)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        x[3, 4] = NAN
        for found, expected in zip(compiled(x, E4M3, True), cast_both_ways(x, E4M3, True), strict=True):
            assert torch.equal(found.factor.nan_to_num(-1.0), expected.factor.nan_to_num(-1.0))
            assert torch.equal(found.values.float().nan_to_num(-1.0), expected.values.float().nan_to_num(-1.0))
            assert found.values.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("format_", fp8.GRADIENTS)
def test_products_on_a_gpu(format_: str, recipe: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    if reason := fp8.unavailable(device):
        pytest.skip(reason)
    p, here = fp8_products(format_, recipe, products.FUSED, device), case(256, 512, 384)
    there = Case(*(t.to(device) for t in here))
    total = torch.full(here.weight.shape, 0.5, device=device)
    p.add_grad_weight(total, there.grad, there.x, 1)
    found = {
        "y": p.forward(there.x, there.weight, there.bias),
        "dx": p.grad_input(there.grad, there.weight),
        "dw": p.grad_weight(there.grad, there.x),
        "sum of dw": total,
    }
    for name, expected in all_products(built(format_, recipe), here).items():
        assert rms(found[name].cpu().double() - expected) < 0.02 * rms(expected), name
    there.x[5, 7] = NAN
    assert not p.forward(there.x, there.weight, None).isfinite().all()
