"""Flags that choose kernels: how operations are computed, never what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ds.cli import arg

Backend = Literal["auto", "reference", "compile", "triton", "apex"]
AttentionBackend = Literal["auto", "flash", "fused", "unfused", "local"]


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Kernels."""

    kernels: Backend = arg(
        "auto",
        "Where operations come from. auto: the fastest that this machine has; reference: plain torch; compile: "
        "torch.compile; triton: our own Triton kernels; apex: NVIDIA apex. `tools/doctor.py` shows what is chosen.",
    )
    attention_backend: AttentionBackend = arg(
        "auto",
        "auto: the fastest; flash: flash attention; fused: cuDNN's; unfused, local: two products and a softmax.",
    )
    use_flash_attn: bool = arg(
        False,
        "The same as --attention-backend flash.",
        "--use-flash-attn",
        "--use-flash-attn-v1",
        "--use-flash-attn-v2",
        "--use-flash-attn-triton",
        "--use-flash-attn-builder",
    )
    masked_softmax_fusion: bool = arg(
        True, "Softmax of --attention-backend unfused, which alone has one, in torch's operators."
    )
    bias_swiglu_fusion: bool = arg(True, "Gated activations and their bias in torch's operators.")
    bias_dropout_fusion: bool = arg(True, "Bias, dropout and add in torch's operators.")
    rope_fusion: bool = arg(True, "Rotary positions in torch's operators.")
    persist_layer_norm: bool = arg(True, "Norms by torch's operator.")
    gradient_accumulation_fusion: bool = arg(
        True, "Make a weight's gradient first, then add it to those of earlier micro-batches."
    )
    fp8_format: Literal["e4m3", "hybrid"] | None = arg(
        None,
        "Products of linear layers in 8-bit floats beside --bf16; hybrid: gradients of outputs in e5m2.",
    )
    fp8_e4m3: bool = arg(False, "The same as --fp8-format e4m3.")
    fp8_hybrid: bool = arg(False, "The same as --fp8-format hybrid.")
    fp8_recipe: Literal["tensorwise", "rowwise"] = arg(
        "tensorwise", "What shares a scale, taken from the values at hand: a whole tensor, or a row."
    )

    @property
    def attention(self) -> AttentionBackend:
        """The attention that was asked for under any name."""
        return "flash" if self.use_flash_attn and self.attention_backend == "auto" else self.attention_backend

    @property
    def fp8(self) -> Literal["e4m3", "hybrid"] | None:
        """The 8-bit format that was asked for under any name."""
        return "e4m3" if self.fp8_e4m3 else "hybrid" if self.fp8_hybrid else self.fp8_format
