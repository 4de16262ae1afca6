"""Which source serves an operation: orders of preference, flags, trials, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch

from megatron_ds.config import parse
from megatron_ds.errors import EXIT_CONFIG, ConfigError
from megatron_ds.kernels import activation, attention, choose, flex, installed, liger, products
from megatron_ds.kernels.choose import OPERATIONS, REFERENCE, Choice, Chosen, Offer
from megatron_ds.kernels.config import KernelConfig
from megatron_ds.kernels.installed import Package
from megatron_ds.kernels.table import Kernels
from megatron_ds.training.run import chosen_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FIELDS = [name for name in OPERATIONS if name != "softmax"]
"""Operations that are entries of the table; softmax lies within attention."""


def sources(chosen: Chosen) -> dict[str, str]:
    return {choice.operation: choice.source for choice in chosen.choices}


def plant(monkeypatch: pytest.MonkeyPatch, **offers: Offer) -> None:
    """Offers in place of the true ones, on CPUs in this order, then torch."""
    made: dict[str, Callable[[torch.device], Offer]] = {
        name: (lambda device, offer=offer: offer) for name, offer in offers.items()
    }
    monkeypatch.setattr(choose, "OFFERS", MappingProxyType({**choose.OFFERS, **made}))
    order = (*offers, "torch", "reference")
    monkeypatch.setattr(choose, "PREFERENCE", {"cpu": order, "cuda": order})


def maker(kernel: Any) -> Callable[[], Any]:
    return lambda: kernel


def pick(**flags: Any) -> Chosen:
    return choose.choose(KernelConfig(**flags), CPU, torch.float32)


def test_a_cpu_takes_torchs_fused_operations_and_looks_at_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: torch.device) -> Offer:
        raise AssertionError("imports what is not needed")

    offers = {name: offer if name in ("torch", "reference") else asked for name, offer in choose.OFFERS.items()}
    monkeypatch.setattr(choose, "OFFERS", MappingProxyType(offers))
    chosen = pick()
    assert chosen.kernels == Kernels()
    assert {source for name, source in sources(chosen).items() if name != "attention"} == {"torch"}
    assert len(chosen.lines()) == 1


def test_reference_is_plain_torch_throughout() -> None:
    chosen = pick(kernels="reference")
    assert all(getattr(chosen.kernels, name) is REFERENCE[name] for name in FIELDS)
    assert chosen.kernels.head is REFERENCE["linear"] and chosen.kernels.attention is attention.torch_attention
    assert {source for name, source in sources(chosen).items() if name != "attention"} == {"reference"}


def test_without_a_gpu_and_with_one_the_order_differs() -> None:
    assert choose.PREFERENCE == {
        "cuda": ("triton", "apex", "liger", "torch", "reference"),
        "cpu": ("torch", "reference"),
    }
    assert all(set(order) <= set(choose.OFFERS) for order in choose.PREFERENCE.values())


@pytest.mark.parametrize(
    ("flag", "operations"),
    [
        ("persist_layer_norm", {"layer_norm", "rms_norm"}),
        ("rope_fusion", {"rope"}),
        ("bias_dropout_fusion", {"bias_dropout_add"}),
        ("masked_softmax_fusion", {"softmax"}),
        ("gradient_accumulation_fusion", {"linear"}),
        ("bias_swiglu_fusion", set()),
    ],
)
def test_a_flag_turns_its_operation_alone_to_the_reference(
    flag: str, operations: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a source whose kernels are all functions of its own."""
    own = {name: maker(kernel) for name, kernel in wrapped().items()}
    plant(monkeypatch, ours=Offer(own))
    monkeypatch.setattr(choose.proof, "disagreement", lambda *anything: None)
    chosen = pick(**{flag: False})
    expected = {name: "reference" if name in operations else "ours" for name in OPERATIONS}
    assert {name: source for name, source in sources(chosen).items() if name != "attention"} == expected
    for name in FIELDS:
        assert (getattr(chosen.kernels, name) is REFERENCE[name]) == (name in operations)
    assert chosen.lines()[1:] == []
    said = {choice.operation: choice.why for choice in chosen.choices}
    assert all(said[name] == (f"--no-{flag.replace('_', '-')}",) for name in operations)


def wrapped() -> dict[str, Any]:
    """Every operation of the reference as something that is not it."""
    tables = {
        "activations": {name: lambda x, bias, f=f: f(x, bias) for name, f in activation.REFERENCE.items()},
        "cross_entropy": REFERENCE["cross_entropy"]._replace(),
        "linear": REFERENCE["linear"]._replace(),
    }
    return {
        **{name: lambda *a, f=f, **k: f(*a, **k) for name, f in REFERENCE.items() if callable(f)},
        **{name: type(table)(*table) if isinstance(table, tuple) else table for name, table in tables.items()},
    }


def test_no_bias_swiglu_fusion_makes_gated_activations_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    own = wrapped()["activations"]
    with monkeypatch.context() as planted:
        plant(planted, ours=Offer({"activations": maker(own)}))
        table = pick(bias_swiglu_fusion=False).kernels.activations
    gated = {"swiglu", "geglu", "geglu_tanh", "reglu", "liglu"}
    assert set(table) == set(own)
    assert all(table[name] is (activation.REFERENCE if name in gated else own)[name] for name in own)
    chosen = pick(bias_swiglu_fusion=False)
    assert pick().kernels.activations["swiglu"] is activation.FUSED["swiglu"] is not activation.swiglu
    (said,) = (choice for choice in chosen.choices if choice.operation == "activations")
    assert said == Choice("activations", "torch", ("--no-bias-swiglu-fusion: gated ones from reference",))


@pytest.mark.parametrize("name", ["compile", "triton", "apex"])
def test_a_source_that_is_missing_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "compiler", lambda: None)
    monkeypatch.setattr(installed, "triton", lambda: Package("triton", None, False, "no triton here"))
    why = {"compile": "needs a C++ compiler", "triton": "no triton here", "apex": "run on GPUs"}[name]
    with pytest.raises(ConfigError, match=rf"(?s)--kernels.*{name}, and .*{why.replace('+', '.')}") as caught:
        pick(kernels=name)
    assert caught.value.exit_code == EXIT_CONFIG == 2


@pytest.mark.parametrize("name", ["compile", "triton", "apex", "liger"])
def test_what_a_gpu_lacks_is_found_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("triton", "apex", "liger"):
        monkeypatch.setattr(installed, package, lambda p=package: Package(p, None, False, f"no {p} here"))
    package = "triton" if name == "compile" else name
    lacks = choose.OFFERS[name](CUDA).lacks
    assert lacks is not None and f"no {package} here" in lacks
    for one in ("triton", "apex", "liger"):
        monkeypatch.setattr(installed, one, lambda p=one: Package(p, "1", True, ""))
    assert choose.OFFERS[name](CUDA).lacks is None
    assert set(choose.OFFERS[name](CUDA).makers) <= set(OPERATIONS)


def test_liger_has_two_operations_and_leaves_the_other_activations_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "liger", lambda: Package("liger_kernel", "0.8", True, ""))
    monkeypatch.setattr(liger, "lacks", lambda operation: f"old: {operation}")
    offer = choose.OFFERS["liger"](CUDA)
    assert set(offer.makers) == {"rms_norm", "activations"}
    assert offer.makers["activations"]() == {**activation.REFERENCE, "swiglu": liger.swiglu}
    assert offer.op_lacks("activations") == "old: swiglu" and offer.op_lacks("rms_norm") == "old: rms_norm"


def broken(*anything: Any) -> Any:
    raise RuntimeError("no kernel image is available\nand more")


def off_by_a_hundredth(x: torch.Tensor, weight: torch.Tensor, bias: None, eps: float) -> torch.Tensor:
    return REFERENCE["rms_norm"](x, weight, bias, eps) * 1.01


def no_module() -> Any:
    raise ImportError("triton has no language")


def test_what_fails_its_trial_is_passed_over_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    good = REFERENCE["layer_norm"]
    wrong = {"layer_norm": maker(broken), "rms_norm": maker(off_by_a_hundredth), "softmax": no_module}
    spare = {"layer_norm": maker(lambda *inputs: good(*inputs))}
    plant(monkeypatch, wrong=Offer(wrong), away=Offer(lacks="not installed"), spare=Offer(spare))
    chosen = pick()
    found = {choice.operation: choice for choice in chosen.choices}
    failed = "wrong: fails here: RuntimeError: no kernel image is available"
    assert found["layer_norm"] == Choice("layer_norm", "spare", (failed, "away: not installed"))
    assert found["rms_norm"].source == "torch" and "wrong: disagrees here" in found["rms_norm"].why[0]
    assert found["softmax"].why[0] == "wrong: fails here: ImportError: triton has no language"
    assert found["rope"] == Choice("rope", "torch", ("wrong: has none", "away: not installed", "spare: has none"))
    first, *rest = chosen.lines()
    assert first.startswith(" > kernels from torch; layer_norm from spare; attention from ")
    assert len(rest) == len(set(rest)) == 4 and not any("has none" in line for line in rest)


def test_a_source_that_was_asked_for_gives_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = wrapped()["rope"]
    plant(monkeypatch, apex=Offer({"rope": maker(kernel), "adamw": maker(broken)}, op_lacks=lambda op: None))
    chosen = pick(kernels="apex")
    assert chosen.kernels.rope is kernel and sources(chosen)["adamw"] == "torch"


def test_an_operation_that_a_source_lacks_here_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    offer = Offer({"rope": no_module}, op_lacks=lambda operation: f"was built without {operation}")
    plant(monkeypatch, some=offer)
    (said,) = (choice for choice in pick().choices if choice.operation == "rope")
    assert said == Choice("rope", "torch", ("some: was built without rope",))


def test_on_a_gpu_torchs_own_operations_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def disagreement(operation: str, *rest: Any) -> str | None:
        tried.append(operation)
        return "this addmm has no out_dtype" if operation == "linear" else None

    monkeypatch.setattr(choose.proof, "disagreement", disagreement)
    monkeypatch.setattr(choose, "PREFERENCE", {"cuda": ("torch", "reference")})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flex, "can_compile", lambda device: False)
    chosen = choose.choose(KernelConfig(), CUDA, torch.bfloat16)
    assert set(OPERATIONS) <= set(tried)
    assert chosen.kernels.linear is REFERENCE["linear"] and sources(chosen)["linear"] == "reference"
    assert chosen.kernels.activations == activation.REFERENCE, "blocks for the cache are for CPUs"
    assert "   passed over: torch: this addmm has no out_dtype" in chosen.lines()


@pytest.mark.parametrize(
    ("flags", "model_type", "masks"),
    [
        ("", "GPT", False),
        ("--window-size 0", "GPT", True),
        ("--reset-attention-mask", "GPT", True),
        ("", "BERT", True),
        ("", "T5", True),
    ],
)
def test_a_run_says_how_wide_it_is_and_whether_it_has_masks(
    flags: str, model_type: str, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, asked = set[int](), []

    def disagreement(operation: str, kernel: Any, reference: Any, device: Any, dtype: Any, hidden_size: int) -> None:
        sizes.add(hidden_size)

    def attention_of(*arguments: Any) -> Any:
        asked.append(arguments)
        return None, None, "nowhere", ()

    plant(monkeypatch, ours=Offer({name: maker(kernel) for name, kernel in wrapped().items()}))
    monkeypatch.setattr(choose.proof, "disagreement", disagreement)
    monkeypatch.setattr(choose, "choose_attention", attention_of)
    argv = f"--num-layers 1 --hidden-size 48 --num-attention-heads 4 {flags}".split()
    chosen_kernels(parse(argv, {"model_type": model_type}), CPU)
    assert sizes == {48} and asked[0][5:7] == (12, masks)


@pytest.mark.parametrize("wanted", ["auto", "compile", "reference"])
def test_a_cpu_that_is_slow_in_half_precision_multiplies_in_fp32(wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "compiler", lambda: "g++")
    monkeypatch.setattr(installed, "slow_half", lambda dtype: "slow" if dtype == torch.bfloat16 else None)
    chosen = choose.choose(KernelConfig(kernels=wanted), CPU, torch.bfloat16)
    kernels, plain = chosen.kernels, wanted == "reference"
    assert (kernels.linear is products.IN_FP32) == (kernels.head is products.IN_FP32) == (not plain)
    assert (kernels.attention is attention.attention_in_fp32) == (not plain)
    said = [name for name, source in sources(chosen).items() if "in fp32" in source]
    assert said == ([] if plain else ["linear", "attention"])
    assert chosen.lines()[1:] == ([] if plain else ["   passed over: slow"])
    for other in (torch.float32, torch.float16):
        assert choose.choose(KernelConfig(), CPU, other).kernels == Kernels()


def test_fp8_wraps_linear_layers_and_not_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "slow_half", lambda dtype: None)
    chosen = choose.choose(KernelConfig(fp8_format="hybrid", fp8_recipe="rowwise"), CPU, torch.bfloat16)
    assert chosen.kernels.head == Kernels().head
    assert chosen.kernels.linear != chosen.kernels.head
    assert sources(chosen)["linear"] == "torch in FP8 (hybrid, rowwise)"
    torch.manual_seed(0)
    x, weight = torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    exact = x.double() @ weight.double().t()
    for made, least, most in ((chosen.kernels.linear, 0.01, 0.1), (chosen.kernels.head, 0.0, 0.005)):
        error = (made.forward(x, weight, None).double() - exact).norm() / exact.norm()
        assert least <= error < most


def test_fp8_on_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(choose.proof, "disagreement", lambda *anything: None)
    monkeypatch.setattr(choose, "PREFERENCE", {"cuda": ("torch",)})
    monkeypatch.setattr(flex, "can_compile", lambda device: False)
    with pytest.raises(ConfigError, match=r"compute capability 8\.9, this one has 8\.0"):
        choose.choose(KernelConfig(fp8_format="e4m3"), CUDA, torch.bfloat16)


def test_unfused_attention_takes_the_softmax_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def counted(scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(scores.shape)
        return REFERENCE["softmax"](scores, *rest)

    plant(monkeypatch, ours=Offer({"softmax": maker(counted)}))
    q = torch.randn(5, 1, 2, 4)
    for flags, expected in (({}, [(1, 2, 5, 5)]), ({"masked_softmax_fusion": False}, [])):
        kernels = pick(attention_backend="unfused", **flags).kernels
        calls.clear()
        kernels.attention(q, q, q, None, attention.Pattern(), 0.0)
        assert calls == expected
