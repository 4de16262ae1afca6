"""Every kernel compiled to machine code for a GPU that need not be there: calls compile and launch nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_ds.kernels.adamw import Hyper, Part
from megatron_ds.kernels.triton import adamw, cross_entropy, dropout_add, norm, rope, softmax
from megatron_ds.kernels.triton.activation import ACTIVATIONS

Tensor = torch.Tensor
HOPPER = GPUTarget("cuda", 90, 32)
SIXTEEN_BYTES = "ld.global.v4.b32"
"""A load as wide as there is, which a mask with an odd edge would have made eight."""


class Absent:
    """As much of a driver as the compiler asks for."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def assembly() -> list[str]:
    """PTX of the kernels that were compiled meanwhile."""
    return []


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch, assembly: list[str]) -> list[str]:
    """Their names."""
    names: list[str] = []

    def on(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*args: Any, **options: Any) -> None:
            code = kernel.run(*args, grid=grid, warmup=True, **options).asm
            assert code["cubin"]
            assembly.append(code["ptx"])
            names.append(kernel.fn.__name__)

        return compile_it

    driver.set_active(Absent())
    monkeypatch.setattr(JITFunction, "__getitem__", on)
    return names


def both_ways(y: Tensor) -> None:
    y.backward(torch.ones_like(y))


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("h", [1, 2048, 12288])
def test_norm(h: int, compiled: list[str]) -> None:
    both_ways(norm.layer_norm(leaf(3, h), leaf(h), leaf(h), 1e-5))
    both_ways(norm.rms_norm(leaf(3, h), leaf(h), None, 1e-5))
    assert compiled == ["_forward", "_backward"] * 2


@pytest.mark.parametrize(
    "name", ["gelu_tanh", "gelu", "relu", "squared_relu", "swiglu", "geglu_tanh", "geglu", "reglu", "liglu"]
)
def test_activation(name: str, compiled: list[str]) -> None:
    both_ways(ACTIVATIONS[name](leaf(3, 2048), leaf(2048) if name == "gelu" else None))
    assert compiled == ["_forward", "_backward"]


def test_dropout_add(compiled: list[str]) -> None:
    both_ways(dropout_add.bias_dropout_add(leaf(3, 2048), leaf(2048), leaf(3, 2048, dtype=torch.float32), 0.1))
    both_ways(dropout_add.bias_dropout_add(leaf(3, 1), None, leaf(3, 1), 0.0))
    assert compiled == ["_kernel"] * 3


@pytest.mark.parametrize("rotated", [2, 32, 80])
def test_rope(rotated: int, compiled: list[str]) -> None:
    both_ways(rope.apply_rope(leaf(5, 2, 4, 80), torch.ones(2, 5, 2, 1, rotated)))
    assert compiled == ["_kernel"] * 2


@pytest.mark.parametrize("valid", [0, 1, 50257])
def test_cross_entropy(valid: int, compiled: list[str], assembly: list[str]) -> None:
    logits, column = leaf(3, 50304).detach(), torch.zeros(3, dtype=torch.int64)
    log_sum, upstream = cross_entropy.statistics(logits, column, valid)
    cross_entropy.gradient(logits, column, valid, log_sum, log_sum, upstream)
    assert compiled == ["_statistics", "_gradient"]
    assert all(SIXTEEN_BYTES in code for code in assembly)


def test_adamw(compiled: list[str]) -> None:
    single, half = torch.ones(5000), torch.ones(5000, dtype=torch.bfloat16)
    parts = [Part(single, half, single, single, half), Part(single, single, single, single, None)]
    one = torch.ones(())
    adamw.adamw(parts, one, one, Hyper(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8))
    assert compiled == ["_update"] * 2


@pytest.mark.parametrize("causal", [True, False])
def test_softmax(causal: bool, compiled: list[str], assembly: list[str]) -> None:
    mask = torch.ones(2, 1, 5, 704, dtype=torch.bool)
    both_ways(softmax.softmax(leaf(2, 3, 5, 704), mask, 0.5, causal))
    assert all(SIXTEEN_BYTES in code for code in assembly)
    both_ways(softmax.softmax(leaf(2, 3, 1, 1), None, 0.5, causal))
    assert compiled == ["_forward", "_backward"] * 2
