"""Which attention serves a run, on made-up GPUs too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron_ds.errors import EXIT_CONFIG, ConfigError
from megatron_ds.kernels import attention, choose_attention, flash_attn, flex, installed, proof
from megatron_ds.kernels.choose_attention import Found
from megatron_ds.kernels.config import AttentionBackend, KernelConfig
from megatron_ds.kernels.installed import Package
from megatron_ds.kernels.mask import visible
from megatron_ds.kernels.softmax import softmax

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
FOUR = "cudnn flash efficient math"
AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)


def choose(
    asked: AttentionBackend = "auto",
    plain: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype = BF16,
    dropout: float = 0.0,
    head_size: int = 128,
    masks: bool = True,
    slow: str | None = None,
) -> Found:
    return choose_attention.choose_attention(asked, plain, device, dtype, dropout, head_size, masks, softmax, slow)


class Gpu:
    """A GPU that nobody has: its capability, the versions of flash-attn beside it, what fails its trial."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.versions, self.compiles = HOPPER, set[int](), True
        self.fails: dict[str, str] = {}
        """By the name of what is tried."""
        self.tried: list[tuple[str, str]] = []
        """Case and name, and each time that something compiled was forgotten."""
        monkeypatch.setattr(installed, "triton", lambda: Package("triton", "3", False, "no C compiler"))
        monkeypatch.setattr(flex, "forget", lambda: self.tried.append(("", "forgotten")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: self.capability)
        monkeypatch.setattr(flex, "can_compile", lambda device: self.compiles)
        monkeypatch.setattr(
            flash_attn, "lacks", lambda version: None if version in self.versions else f"no version {version}"
        )
        monkeypatch.setattr(flash_attn, "flash_attention", self.flash)
        monkeypatch.setattr(attention, "by_backends", self.by_backends)
        monkeypatch.setattr(proof, "disagreement", self.trial)

    def by_backends(self, backends: list[SDPBackend]) -> attention.Attention:
        def call(*inputs: Any) -> torch.Tensor:
            raise AssertionError("never called")

        call.__name__ = " ".join(backend.name.split("_")[0].lower() for backend in backends)
        return call

    def flash(self, version: int, mask: Any, other: Any) -> Any:
        def call(*inputs: Any) -> torch.Tensor:
            raise AssertionError("never called")

        call.__name__ = f"fa{version}"
        return flash_attn.FlashAttention(call, call, version == 2, mask, other)

    def trial(self, operation: str, kernel: Any, reference: Any, device: torch.device, dtype: torch.dtype) -> Any:
        assert reference.attention is attention.torch_attention
        owner = getattr(kernel.attention, "__self__", None)
        name = owner.dense.__name__ if owner else kernel.attention.__name__
        self.tried.append((operation, name))
        return self.fails.get(name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.mark.parametrize(
    ("asked", "plain", "call", "source"),
    [
        ("auto", False, attention.attention, "blocks of rows up to 512 positions, torch SDPA beyond"),
        ("auto", True, attention.torch_attention, "torch SDPA"),
        ("flash", False, attention.torch_attention, "torch SDPA"),
        ("flash", True, attention.torch_attention, "torch SDPA"),
    ],
)
def test_on_a_cpu(asked: AttentionBackend, plain: bool, call: Any, source: str) -> None:
    assert choose(asked, plain) == (visible, call, source, ())


def test_on_a_cpu_with_dropout_and_in_fp32() -> None:
    """Blocks serve a validation; in fp32 where half precision is slow."""
    mask, call, source, why = choose(dropout=0.1, slow="slow")
    assert (mask, call, why) == (visible, attention.attention_in_fp32, ("slow",))
    assert source.startswith("torch SDPA with dropout; without, blocks of rows") and source.endswith(", in fp32")
    assert choose(slow="slow")[2].startswith("blocks of rows")


@pytest.mark.parametrize("asked", ["unfused", "local"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_unfused_where_it_is_asked_for(asked: AttentionBackend, device: torch.device) -> None:
    mask, call, source, why = choose(asked, device=device)
    assert (mask, source, why) == (visible, "two products and a softmax", ())
    assert call.__qualname__.startswith("unfused")


@pytest.mark.parametrize(("device", "dtype"), [(CPU, BF16), (CPU, FP32), (CUDA, FP32)], ids=str)
def test_fused_needs_a_gpu_and_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="half precision on a GPU") as caught:
        choose("fused", device=device, dtype=dtype)
    assert caught.value.exit_code == EXIT_CONFIG


def test_use_flash_attn_is_a_name_of_flash() -> None:
    assert KernelConfig(use_flash_attn=True).attention == "flash"
    assert KernelConfig(attention_backend="local").attention == "local"


@pytest.mark.parametrize(
    ("asked", "capability", "versions", "options", "expected"),
    [
        ("auto", HOPPER, (), {}, "cudnn flash efficient math"),
        ("auto", AMPERE, (), {}, "flash cudnn efficient math"),
        ("flash", HOPPER, (), {}, "flash efficient math"),
        ("fused", AMPERE, (2, 3), {}, "cudnn efficient math"),
        ("auto", HOPPER, (2,), {}, "cudnn flash efficient math"),  # cuDNN's is faster than version 2
        ("auto", BLACKWELL, (2, 3), {}, "cudnn flash efficient math"),
        ("flash", BLACKWELL, (2, 3), {}, "fa2"),
        ("flash", HOPPER, (2,), {}, "fa2"),
        ("auto", HOPPER, (2, 3), {}, "fa3"),
        ("auto", ADA, (2, 3), {}, "fa2"),
        ("flash", HOPPER, (2, 3), {"dropout": 0.1}, "fa2"),
        ("auto", AMPERE, (2,), {"head_size": 512}, "flash cudnn efficient math"),
        ("auto", HOPPER, (2, 3), {"dtype": FP32}, "efficient math"),
    ],
)
def test_on_gpus(
    gpu: Gpu, asked: AttentionBackend, capability: Any, versions: Any, options: dict[str, Any], expected: str
) -> None:
    gpu.capability, gpu.versions, gpu.compiles = capability, set(versions), False
    mask, call, source, why = choose(asked, device=CUDA, **options)
    if expected.startswith("fa"):
        assert isinstance(call.__self__, flash_attn.FlashAttention)
        assert call.__self__.dense.__name__ == expected and mask == call.__self__.mask
        assert source == f"flash-attn {expected[-1]}"
    else:
        assert (call.__name__, mask) == (expected, visible)
        assert source == f"torch SDPA, {expected.split()[0]}_attention first"
    assert "FlexAttention: no C compiler" in why


def test_masks_go_through_flex_attention(gpu: Gpu) -> None:
    mask, call, source, why = choose(device=CUDA)
    assert mask is flex.flex_mask and call.__qualname__.startswith("through")
    assert source == "torch SDPA, cudnn_attention first, FlexAttention for masks"
    assert why == ("flash-attn 3: no version 3",)
    mask, _, source, why = choose(device=CUDA, dropout=0.1)
    assert mask is visible and "Flex" not in source and why[0] == "FlexAttention: has no dropout"
    assert gpu.tried.count(("attention", "flex")) == 1
    mask, _, source, why = choose(device=CUDA, masks=False)
    assert mask is visible and "Flex" not in str((source, why))
    assert gpu.tried.count(("attention", "flex")) == 1, "a compilation for nothing"


def test_flex_attention_is_tried_and_what_that_compiled_forgotten(gpu: Gpu) -> None:
    choose(device=CUDA)
    assert gpu.tried[-2:] == [("attention", "flex"), ("", "forgotten")]
    gpu.fails = {"flex": "fails here: no headers"}
    mask, call, source, why = choose(device=CUDA)
    assert gpu.tried[-2:] == [("attention", "flex"), ("", "forgotten")]
    assert (mask, call.__name__, source) == (visible, FOUR, "torch SDPA, cudnn_attention first")
    assert why[0] == "FlexAttention: fails here: no headers"


def test_a_backend_is_tried_alone_and_with_those_that_take_its_masks(gpu: Gpu) -> None:
    choose("fused", device=CUDA, masks=False)
    assert gpu.tried == [("causal attention", "cudnn"), ("attention", "cudnn efficient math")]
    gpu.fails = {"cudnn efficient math": "disagrees here"}
    assert choose(device=CUDA)[2].startswith("torch SDPA, flash_attention first")


@pytest.mark.parametrize(
    ("asked", "fails", "versions", "options", "said"),
    [
        ("flash", "flash", (), {}, "flash_attention: broken; flash-attn 3: no version 3; flash-attn 2: no version 2"),
        ("flash", "flash", (2,), {"head_size": 512}, "flash_attention: broken; .*heads of 512"),
        ("flash", "", (2,), {"dtype": FP32}, "flash in torch.float32; .*flash-attn has no torch.float32"),
        ("fused", "cudnn", (2, 3), {}, "fused in torch.bfloat16; cudnn_attention: broken"),
    ],
)
def test_what_is_asked_for_by_name_is_not_replaced(
    gpu: Gpu, asked: AttentionBackend, fails: str, versions: Any, options: dict[str, Any], said: str
) -> None:
    gpu.fails, gpu.versions = {fails: "broken"}, set(versions)
    with pytest.raises(ConfigError, match=rf"(?s)--attention-backend.*{said}") as caught:
        choose(asked, device=CUDA, **options)
    assert caught.value.exit_code == EXIT_CONFIG and "FlexAttention" not in str(caught.value)
    if fails == "flash" and not options:
        gpu.versions = {3}
        assert choose(asked, device=CUDA)[2] == "flash-attn 3"


def test_flex_attention_can_be_compiled_where_triton_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable in (True, False):
        monkeypatch.setattr(installed, "triton", lambda usable=usable: Package("triton", "3", usable, ""))
        assert flex.can_compile(CUDA) == usable and not flex.can_compile(CPU)


def test_flash_attn_leaves_what_it_cannot_say_to_flex_attention(gpu: Gpu) -> None:
    gpu.versions = {3}
    _, call, _, _ = choose(device=CUDA)
    assert call.__self__.other_mask is flex.flex_mask


def test_what_fails_its_trial_is_passed_over(gpu: Gpu) -> None:
    gpu.versions = {2, 3}
    gpu.fails = {"fa3": "fails here: no kernel image", "cudnn": "disagrees here"}
    _, _, source, why = choose(device=CUDA)
    assert source == "torch SDPA, flash_attention first, FlexAttention for masks"
    assert why == ("cudnn_attention: disagrees here", "flash-attn 3: fails here: no kernel image")
    gpu.fails |= {"flash": "fails here: x"}
    assert choose(device=CUDA)[2].startswith("torch SDPA, efficient_attention first")


def test_kernels_reference_is_torchs_own_call_unless_another_is_asked_for(gpu: Gpu) -> None:
    assert choose(plain=True, device=CUDA) == (visible, attention.torch_attention, "torch SDPA", ())
    gpu.compiles = False
    assert choose("fused", plain=True, device=CUDA)[1].__name__ == "cudnn efficient math"
    assert choose("flash", plain=True, device=CUDA)[1].__name__ == "flash efficient math"
