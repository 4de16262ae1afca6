"""Fills the table of operations for a machine, once at start, and says what was chosen and why.

Every source offers some operations; for each one the first source in order of preference serves that is asked for, is
installed, and passes a trial on the device (kernels/proof.py). torch itself comes last and offers everything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from megatron_ds.errors import ConfigError
from megatron_ds.kernels import (
    activation,
    adamw,
    apex,
    cross_entropy,
    dropout_add,
    fp8,
    installed,
    norm,
    products,
    proof,
    rope,
    softmax,
)
from megatron_ds.kernels.choose_attention import choose_attention
from megatron_ds.kernels.config import KernelConfig
from megatron_ds.kernels.table import Kernels

OPERATIONS = (
    "layer_norm", "rms_norm", "activations", "rope", "bias_dropout_add", "cross_entropy", "softmax", "linear", "adamw",
)  # fmt: skip
SWITCHES = {
    "layer_norm": "persist_layer_norm",
    "rope": "rope_fusion",
    "bias_dropout_add": "bias_dropout_fusion",
    "softmax": "masked_softmax_fusion",
    "linear": "gradient_accumulation_fusion",
}
"""Megatron's --no-* flags that turn one operation to plain torch."""
PREFERENCE = {"cuda": ("triton", "apex", "torch"), "cpu": ("torch",)}


class Choice(NamedTuple):
    """Where an operation comes from, and why from there."""

    operation: str
    source: str
    why: str


class Chosen(NamedTuple):
    """A table, and where its entries come from."""

    kernels: Kernels
    choices: tuple[Choice, ...]

    def lines(self) -> list[str]:
        """What comes from where, a line per source, and what was passed over."""
        by_source: dict[str, list[str]] = {}
        for choice in self.choices:
            by_source.setdefault(choice.source, []).append(choice.operation)
        said = [f" > kernels from {source}: {', '.join(names)}" for source, names in by_source.items()]
        reasons = dict.fromkeys(choice.why for choice in self.choices if choice.why)
        return said + [f"   passed over {reason}" for reason in reasons if ": " in reason]


@dataclass(frozen=True)
class Offer:
    """What one source has: a maker per operation, or why it has nothing here."""

    makers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    lacks: str | None = None
    op_lacks: Callable[[str], str | None] = lambda operation: None


REFERENCE: Mapping[str, Any] = MappingProxyType(
    {
        "layer_norm": norm.layer_norm,
        "rms_norm": norm.rms_norm,
        "activations": activation.REFERENCE,
        "rope": rope.apply_rope,
        "bias_dropout_add": dropout_add.bias_dropout_add,
        "cross_entropy": cross_entropy.REFERENCE,
        "softmax": softmax.softmax,
        "linear": products.REFERENCE,
        "adamw": adamw.reference,
    }
)
"""Every operation in plain torch."""


def choose(
    config: KernelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    attention_dropout: float = 0.0,
    head_size: int = 128,
) -> Chosen:
    """The table for a device and a precision of parameters.

    Raises: ConfigError if what was asked for by name is not to be had here
    """
    offers = {source: offer(device) for source, offer in OFFERS.items()}
    wanted = config.kernels
    if wanted != "auto" and offers[wanted].lacks:
        raise ConfigError(
            "--kernels", f"{wanted}, and {offers[wanted].lacks}", "kernels that this machine has", "--kernels auto"
        )
    found: dict[str, Any] = {}
    choices = []
    for operation in OPERATIONS:
        found[operation], choice = _first(operation, config, offers, device, dtype)
        choices.append(choice)
    head = found["linear"]
    found["linear"], choice = _linear(config, head, choices[OPERATIONS.index("linear")], device)
    choices[OPERATIONS.index("linear")] = choice
    mask, attention, why = choose_attention(
        config.attention, wanted == "reference", device, dtype, attention_dropout, head_size, found.pop("softmax")
    )
    choices.append(Choice("attention", *why))
    return Chosen(Kernels(**found, head=head, mask=mask, attention=attention), tuple(choices))


def _first(
    operation: str, config: KernelConfig, offers: Mapping[str, Offer], device: torch.device, dtype: torch.dtype
) -> tuple[Any, Choice]:
    """An operation from the first source that can serve, and what was wrong with those before it."""
    switch = SWITCHES.get(operation)
    if switch and not getattr(config, switch):
        return REFERENCE[operation], Choice(operation, "reference", f"--no-{switch.replace('_', '-')}")
    order = PREFERENCE[device.type] if config.kernels == "auto" else (config.kernels, "torch")
    passed_over: list[str] = []
    for source in order:
        offer = offers[source]
        why = offer.lacks or (None if operation in offer.makers else "has none") or offer.op_lacks(operation)
        if why is None:
            kernel = offer.makers[operation]()
            # torch's operators and what is compiled of them need no trial.
            trial = source in ("triton", "apex")
            why = proof.disagreement(operation, kernel, REFERENCE[operation], device, dtype) if trial else None
            if why is None:
                return _without_gates(operation, kernel, config), Choice(operation, source, "; ".join(passed_over))
        passed_over.append(f"{source}: {why}")
    raise AssertionError("torch offers every operation")


def _without_gates(operation: str, kernel: Any, config: KernelConfig) -> Any:
    """With --no-bias-swiglu-fusion the gated activations are torch's."""
    if operation != "activations" or config.bias_swiglu_fusion:
        return kernel
    gated = {name: function for name, function in activation.REFERENCE.items() if name.endswith("glu")}
    return MappingProxyType({**kernel, **gated, "geglu_tanh": activation.geglu_tanh})


def _linear(
    config: KernelConfig, plain: products.Products, choice: Choice, device: torch.device
) -> tuple[products.Products, Choice]:
    """Products in FP8 around the plain ones, if asked for."""
    if config.fp8 is None:
        return plain, choice
    why = fp8.unavailable(device)
    if why:
        raise ConfigError("--fp8-format", f"{config.fp8}, and {why}", "a GPU of compute capability 8.9", "--bf16 alone")
    return (
        fp8.fp8_products(config.fp8, config.fp8_recipe, plain, device),
        Choice("linear", f"torch, FP8 {config.fp8} {config.fp8_recipe}", choice.why),
    )


def _nothing_more(kernel: Any) -> Callable[[], Any]:
    return lambda: kernel


def _reference(device: torch.device) -> Offer:
    return Offer({operation: _nothing_more(kernel) for operation, kernel in REFERENCE.items()})


def _torch(device: torch.device) -> Offer:
    """torch's own operators, put together as is fastest: in blocks on a CPU, whole on a GPU."""
    fused = {
        "activations": activation.FUSED if device.type == "cpu" else activation.REFERENCE,
        "bias_dropout_add": dropout_add.fused_bias_dropout_add,
        "cross_entropy": cross_entropy.BY_BLOCKS,
        "linear": products.FUSED,
        "adamw": adamw.fused,
    }
    makers = {operation: _nothing_more(kernel) for operation, kernel in {**REFERENCE, **fused}.items()}
    if device.type == "cuda":
        makers["linear"] = partial(_summing_products, device)
    return Offer(makers)


def _summing_products(device: torch.device) -> products.Products:
    """torch's products, adding weight gradients as they are made where this torch can on this device."""
    fused, half = products.FUSED, torch.bfloat16
    wrong = proof.disagreement("linear", fused, products.REFERENCE, device, half)
    return products.REFERENCE if wrong else fused


def _compile(device: torch.device) -> Offer:
    """Plain torch under torch.compile, one operation at a time: all layers share what is compiled."""
    if device.type == "cpu" and installed.compiler() is None:
        return Offer(lacks="torch.compile needs a C++ compiler on CPUs (CXX, g++, clang++)")
    if device.type == "cuda" and not installed.triton().usable:
        return Offer(lacks=f"torch.compile needs Triton on GPUs: {installed.triton().why}")
    compiled = {name: partial(torch.compile, REFERENCE[name]) for name in ("layer_norm", "rms_norm", "rope", "softmax")}
    return Offer(
        {
            **compiled,
            "activations": lambda: {name: torch.compile(call) for name, call in activation.REFERENCE.items()},
            "bias_dropout_add": partial(torch.compile, dropout_add.bias_dropout_add),
            "cross_entropy": lambda: cross_entropy.CrossEntropy(
                torch.compile(cross_entropy.statistics), torch.compile(cross_entropy.gradient)
            ),
        }
    )


def _triton(device: torch.device) -> Offer:
    """Our own kernels; on a CPU only where Triton interprets them, for tests."""
    package = installed.triton()
    if not package.usable:
        return Offer(lacks=package.why)
    if device.type == "cpu" and not importlib.import_module("triton").knobs.runtime.interpret:
        return Offer(lacks="Triton's kernels run on GPUs (on a CPU with TRITON_INTERPRET=1, slowly)")
    room = "megatron_ds.kernels.triton."

    def load(module: str, name: str) -> Any:
        return getattr(importlib.import_module(room + module), name)

    return Offer(
        {
            "layer_norm": partial(load, "norm", "layer_norm"),
            "rms_norm": partial(load, "norm", "rms_norm"),
            "activations": lambda: {name: load("activation", name) for name in activation.REFERENCE},
            "rope": partial(load, "rope", "apply_rope"),
            "bias_dropout_add": partial(load, "dropout_add", "bias_dropout_add"),
            "cross_entropy": lambda: cross_entropy.CrossEntropy(
                load("cross_entropy", "statistics"), load("cross_entropy", "gradient")
            ),
            "softmax": partial(load, "softmax", "softmax"),
            "adamw": partial(load, "adamw", "adamw"),
        }
    )


def _apex(device: torch.device) -> Offer:
    package = installed.apex()
    if device.type != "cuda":
        return Offer(lacks="apex's kernels run on GPUs")
    if not package.usable:
        return Offer(lacks=package.why)
    names = {"linear": "add_product"}
    return Offer(
        {
            "layer_norm": _nothing_more(apex.layer_norm),
            "rms_norm": _nothing_more(apex.rms_norm),
            "softmax": lambda: apex.softmax_or(softmax.softmax),
            "linear": lambda: products.FUSED._replace(add_grad_weight=apex.add_product),
            "adamw": _nothing_more(apex.adamw),
        },
        op_lacks=lambda operation: apex.lacks(names.get(operation, operation)),
    )


OFFERS: Mapping[str, Callable[[torch.device], Offer]] = MappingProxyType(
    {"reference": _reference, "torch": _torch, "compile": _compile, "triton": _triton, "apex": _apex}
)
