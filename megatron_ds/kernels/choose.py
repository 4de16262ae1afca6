"""Fills the table of operations for a machine, once at start, and says what was chosen and why.

Every source offers some operations; for each one the first source in order of preference serves that is asked for, is
installed, and passes a trial on the device (kernels/proof.py). torch itself comes last and offers everything.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
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
    liger,
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
    "rms_norm": "persist_layer_norm",
    "rope": "rope_fusion",
    "bias_dropout_add": "bias_dropout_fusion",
    "softmax": "masked_softmax_fusion",
    "linear": "gradient_accumulation_fusion",
}
"""Megatron's --no-* flags that turn one operation to plain torch; for gated activations see `_plain_gates`."""
PREFERENCE = {"cuda": ("triton", "apex", "liger", "torch", "reference"), "cpu": ("torch", "reference")}
NOTHING = "has none"
Trial = Callable[[str, Any], "str | None"]
"""What is wrong with a kernel of an operation."""


class Choice(NamedTuple):
    """Where an operation comes from, and why not from anywhere else: a reason for each source before it."""

    operation: str
    source: str
    why: tuple[str, ...] = ()


class Chosen(NamedTuple):
    """A table, and where its entries come from."""

    kernels: Kernels
    choices: tuple[Choice, ...]

    def lines(self) -> list[str]:
        """The source of most operations and those that come from elsewhere; what was passed over."""
        (main, _), *_ = Counter(choice.source for choice in self.choices).most_common(1)
        others: dict[str, list[str]] = {}
        for choice in self.choices:
            if choice.source != main:
                others.setdefault(choice.source, []).append(choice.operation)
        parts = [main, *(f"{', '.join(names)} from {source}" for source, names in others.items())]
        # Neither what was asked for nor what no source of that name has is news.
        reasons = dict.fromkeys(
            why for choice in self.choices for why in choice.why if not (why.startswith("--") or why.endswith(NOTHING))
        )
        return [f" > kernels from {'; '.join(parts)}", *(f"   passed over: {reason}" for reason in reasons)]


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
    hidden_size: int = 96,
    masks: bool = True,
) -> Chosen:
    """The table for a device and a precision of parameters; `masks`: whether a run may have any but a causal one.

    Raises: ConfigError if what was asked for by name is not to be had here
    """
    wanted = config.kernels
    offers = cache(lambda source: OFFERS[source](device))  # only those that somebody asks about: looking costs imports
    if wanted != "auto" and offers(wanted).lacks:
        raise ConfigError(
            "--kernels", f"{wanted}, and {offers(wanted).lacks}", "kernels that this machine has", "--kernels auto"
        )

    def trial(operation: str, kernel: Any) -> str | None:
        return proof.disagreement(operation, kernel, REFERENCE[operation], device, dtype, hidden_size)

    found: dict[str, Any] = {}
    choices: dict[str, Choice] = {}
    for operation in OPERATIONS:
        found[operation], choices[operation] = _first(operation, config, offers, device, trial)
    served = choices["linear"]
    slow = installed.slow_half(dtype) if device.type == "cpu" else None
    if slow and served.source in ("torch", "compile"):
        found["linear"] = products.IN_FP32
        choices["linear"] = Choice("linear", "torch in fp32", (*served.why, slow))
    head = found["linear"]
    if config.fp8 is not None:
        found["linear"] = _in_fp8(config, head, device)
        source = f"{served.source} in FP8 ({config.fp8}, {config.fp8_recipe})"
        choices["linear"] = served._replace(source=source)
    plain, unfused = wanted == "reference", found.pop("softmax")
    mask, attention, source, why = choose_attention(
        config.attention, plain, device, dtype, attention_dropout, head_size, masks, unfused, slow
    )
    choices["attention"] = Choice("attention", source, why)
    return Chosen(Kernels(**found, head=head, mask=mask, attention=attention), tuple(choices.values()))


def _first(
    operation: str, config: KernelConfig, offers: Callable[[str], Offer], device: torch.device, trial: Trial
) -> tuple[Any, Choice]:
    """An operation from the first source that can serve, and what was wrong with those before it."""
    switch = SWITCHES.get(operation)
    if switch and not getattr(config, switch):
        return REFERENCE[operation], Choice(operation, "reference", (_flag(switch),))
    order = PREFERENCE[device.type] if config.kernels == "auto" else (config.kernels, "torch", "reference")
    passed_over: list[str] = []
    for source in order:
        kernel, why = _tried(operation, source, offers(source), device, trial)
        if why is None:
            return _plain_gates(kernel, Choice(operation, source, tuple(passed_over)), config)
        passed_over.append(f"{source}: {why}")
    raise AssertionError("the reference offers every operation")


def _tried(operation: str, source: str, offer: Offer, device: torch.device, trial: Trial) -> tuple[Any, str | None]:
    """A source's operation, and why it will not do."""
    why = offer.lacks or (None if operation in offer.makers else NOTHING) or offer.op_lacks(operation)
    if why is not None:
        return None, why
    try:
        kernel = offer.makers[operation]()
    except Exception as error:  # a module of kernels that this version of Triton refuses, say
        return None, proof.failure(error)
    # A trial of what torch compiles would compile it for shapes that no run has; torch on a CPU is tested enough.
    if source in ("reference", "compile") or (source == "torch" and device.type == "cpu"):
        return kernel, None
    return kernel, trial(operation, kernel)


def _plain_gates(kernel: Any, choice: Choice, config: KernelConfig) -> tuple[Any, Choice]:
    """With --no-bias-swiglu-fusion the gated activations are torch's."""
    if choice.operation != "activations" or config.bias_swiglu_fusion:
        return kernel, choice
    gated = {name: function for name, function in activation.REFERENCE.items() if "glu" in name}
    why = f"{_flag('bias_swiglu_fusion')}: gated ones from reference"
    return MappingProxyType({**kernel, **gated}), choice._replace(why=(*choice.why, why))


def _flag(switch: str) -> str:
    return f"--no-{switch.replace('_', '-')}"


def _in_fp8(config: KernelConfig, plain: products.Products, device: torch.device) -> products.Products:
    """Products in FP8, around the plain ones."""
    assert config.fp8 is not None
    why = fp8.unavailable(device)
    if why:
        raise ConfigError("--fp8-format", f"{config.fp8}, and {why}", "a GPU of compute capability 8.9", "--bf16 alone")
    return fp8.fp8_products(config.fp8, config.fp8_recipe, plain, device)


def _nothing_more(kernel: Any) -> Callable[[], Any]:
    return lambda: kernel


def _reference(device: torch.device) -> Offer:
    return Offer({operation: _nothing_more(kernel) for operation, kernel in REFERENCE.items()})


def _torch(device: torch.device) -> Offer:
    """torch's own operators, put together as is fastest: in blocks on a CPU, whole on a GPU."""
    fused = {
        "layer_norm": norm.exact_layer_norm if device.type == "cpu" else norm.layer_norm,
        "activations": activation.FUSED if device.type == "cpu" else activation.REFERENCE,
        "bias_dropout_add": dropout_add.fused_bias_dropout_add,
        "cross_entropy": cross_entropy.BY_BLOCKS,
        "linear": products.FUSED,
        "adamw": adamw.fused,
    }
    return Offer({operation: _nothing_more(kernel) for operation, kernel in {**REFERENCE, **fused}.items()})


def _compile(device: torch.device) -> Offer:
    """Plain torch under torch.compile, one operation at a time: all layers share what is compiled.

    What torch's operators do as well in blocks, cross-entropy on CPUs, is left to them.
    """
    if device.type == "cpu" and installed.compiler() is None:
        return Offer(lacks="torch.compile needs a C++ compiler on CPUs (CXX, g++, clang++)")
    if device.type == "cuda" and not installed.triton().usable:
        return Offer(lacks=f"torch.compile needs Triton on GPUs: {installed.triton().why}")
    names = ("layer_norm", "rms_norm", "rope", "softmax", "bias_dropout_add")
    compiled = {name: partial(_whole, REFERENCE[name]) for name in names}
    others = _compiled_for_cpu() if device.type == "cpu" else _compiled_for_gpu()
    return Offer({**compiled, **others})


def _compiled_for_cpu() -> dict[str, Callable[[], Any]]:
    gelu_tanh = partial(_whole, activation.gelu_tanh_and_slope)
    add = partial(_whole, products.add_flat, dynamic=True)
    return {
        "activations": lambda: {**_compiled_activations(), "gelu_tanh": activation.with_slope(gelu_tanh())},
        "linear": lambda: products.FUSED._replace(add_grad_weight=partial(products.add_product, add=add())),
    }


def _compiled_for_gpu() -> dict[str, Callable[[], Any]]:
    return {
        "activations": _compiled_activations,
        "cross_entropy": lambda: cross_entropy.CrossEntropy(
            _whole(cross_entropy.statistics), _whole(cross_entropy.gradient)
        ),
    }


def _compiled_activations() -> dict[str, activation.Activation]:
    return {name: _whole(call) for name, call in activation.REFERENCE.items()}


def _whole(function: Callable[..., Any], dynamic: bool | None = None) -> Any:
    """Compiled as one graph: what torch cannot compile it would otherwise run uncompiled and say nothing."""
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


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
            "activations": partial(load, "activation", "ACTIVATIONS"),
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
    """NVIDIA apex, as far as its modules were built."""
    if device.type != "cuda":
        return Offer(lacks="apex's kernels run on GPUs")
    package = installed.apex()
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


def _liger(device: torch.device) -> Offer:
    """Two of Liger's, for where our own fail."""
    if device.type != "cuda":
        return Offer(lacks="Liger's kernels run on GPUs")
    if not installed.liger().usable:
        return Offer(lacks=installed.liger().why)
    names = {"activations": "swiglu"}
    return Offer(
        {
            "rms_norm": _nothing_more(liger.rms_norm),
            "activations": _nothing_more(MappingProxyType({**activation.REFERENCE, "swiglu": liger.swiglu})),
        },
        op_lacks=lambda operation: liger.lacks(names.get(operation, operation)),
    )


OFFERS: Mapping[str, Callable[[torch.device], Offer]] = MappingProxyType(
    {
        "reference": _reference,
        "torch": _torch,
        "compile": _compile,
        "triton": _triton,
        "apex": _apex,
        "liger": _liger,
    }
)
