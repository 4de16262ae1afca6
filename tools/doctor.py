#!/usr/bin/env python3
"""Say what this machine has, which kernels a run would take here and why, and what another package would change.

python tools/doctor.py --bf16 --kernels triton --device cpu

Any training flags may follow; those that kernels depend on count.
"""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_ds.config import Config, parse, parser
from megatron_ds.errors import EXIT_OK, ConfigError, ConfigErrors, UserError
from megatron_ds.kernels import installed
from megatron_ds.kernels.choose import NOTHING, OFFERS, Choice, choose
from megatron_ds.kernels.config import Backend
from megatron_ds.presets import PRESETS
from megatron_ds.rules import check_kernels, check_precision
from megatron_ds.training.cpu import fair_share
from megatron_ds.training.run import dtype_of

WIDTH = 110
HEAD_SIZE = 128
"""Where no flag says one."""
ADDS = {
    "triton": "on a GPU our own norms, activations, rope, bias-dropout-add, cross-entropy, softmax and AdamW, masks by "
    "FlexAttention and --kernels compile; on a CPU nothing.",
    "apex": "on a GPU norms, softmax and AdamW where Triton's fail, and --kernels apex. PyPI's apex is another.",
    "flash_attn": "on GPUs of compute capability 8.x attention, of documents too; on newer ones only with "
    "--attention-backend flash, since torch's cuDNN attention is faster.",
    "flash_attn_interface": "on Hopper attention, of documents too.",
    "transformer_engine": "nothing: its norms are modules that own their weights, its attention chooses between "
    "flash-attn and cuDNN, which torch's SDPA has too, its FP8 products are torch's scaled matmul here.",
    "liger_kernel": "on a GPU RMSNorm and SwiGLU where our own Triton kernels fail.",
    "torchao": "nothing: its FP8 products are torch's scaled matmul, which --fp8-format calls itself.",
    "C++ compiler": "on a CPU --kernels compile. Nothing else there needs one.",
}
"""What each would add to a run, or, where that is nothing, why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    try:
        config = read(sys.argv[1:] if argv is None else argv)
        print("\n".join(page(config)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


def read(argv: Sequence[str]) -> Config:
    """The flags, of any recipe.

    Raises: ConfigError if they are none, or ask for kernels and precisions that exclude each other
    """
    name = "tools/doctor.py"
    reader = parser(name)
    reader.usage, reader.description = f"{name} [training flags]", (__doc__ or "").split("\n\n")[0]
    typed = {key.split(".")[1]: value for key, value in reader.read(argv).items()}
    preset = PRESETS.get(str(typed.get("model_preset")).lower())
    config = parse(argv, {"model_type": preset.model_type} if preset else {}, name)
    errors = [*check_precision(config), *check_kernels(config)]
    if errors:
        raise ConfigErrors(errors)
    return config


def page(config: Config) -> Iterator[str]:
    """The lines of the answer.

    Raises: ConfigError if kernels or a device are asked for by name that are not to be had here
    """
    device, dtype = _device(config), dtype_of(config)
    model = config.model
    sized = model.hidden_size and model.num_attention_heads
    head = model.head_size if sized else model.kv_channels or HEAD_SIZE
    dropout = model.attention_dropout
    masks = model.model_type != "GPT" or model.window_size is not None or config.data.reset_attention_mask
    sizes = {"head_size": head, "hidden_size": model.hidden_size or 96}
    choices = choose(config.kernels, device, dtype, attention_dropout=dropout, masks=masks, **sizes).choices
    yield "Machine"
    yield from _table(machine(config))
    yield ""
    wanted, precision = config.kernels.kernels, str(dtype).removeprefix("torch.")
    yield f"Kernels: --kernels {wanted}, {precision}, on {device.type}; heads of {head}, attention dropout {dropout:g}"
    yield from _table((choice.operation, _explained(choice)) for choice in choices)
    yield ""
    yield "Other values of --kernels"
    yield from _table(
        (source, OFFERS[source](device).lacks or "can be asked for")
        for source in get_args(Backend)[1:]
        if source != wanted
    )
    yield ""
    yield "Installed"
    packages = [*installed.packages(), _compiler()]
    yield from _table((package.name, _usable(package)) for package in packages if package.usable)
    yield ""
    yield "Missing"
    yield from _table((name, f"{why}. Adds {ADDS[name]}") for name, _, usable, why in packages if not usable)


def _compiler() -> installed.Package:
    path = installed.compiler()
    return installed.Package("C++ compiler", path, path is not None, "" if path else "no CXX, g++, clang++")


def _usable(package: installed.Package) -> str:
    """Its version, and whether any of it is of use."""
    part = f"; in part: {package.why}" if package.why else ""
    adds = ADDS[package.name]
    return f"{package.version or 'version unknown'}{part}{f'; adds {adds}' if adds.startswith('nothing') else ''}"


def _device(config: Config) -> torch.device:
    wanted = config.parallel.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "cuda, and torch sees no GPU", "auto or cpu on this machine", "--device auto")
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def machine(config: Config) -> Iterator[tuple[str, str]]:
    """What kernels depend on besides packages."""
    yield "torch", f"{torch.__version__}, Python {platform.python_version()}, CUDA {torch.version.cuda or 'none'}"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        yield "GPU", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    else:
        yield "GPU", "none that torch sees"
    has = {"AVX512_BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    bf16 = " and ".join(name for name, there in has.items() if there)
    speed = f"bf16 products by {bf16}" if bf16 else "neither AVX512_BF16 nor AMX: bf16 is no faster than fp32"
    yield "CPU", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {speed}"
    said, typed = os.environ.get("OMP_NUM_THREADS"), config.parallel.cpu_threads_per_rank
    threads = typed or (torch.get_num_threads() if said else fair_share())
    source = "--cpu-threads-per-rank" if typed else f"OMP_NUM_THREADS={said}" if said else "the cores at hand"
    yield "threads", f"{threads} for a rank, of {os.cpu_count()} cores ({source})"


def _explained(choice: Choice) -> str:
    """A source, and why not those before it."""
    reasons = [why for why in choice.why if not why.endswith(NOTHING)]
    return choice.source + (f"  ({'; '.join(reasons)})" if reasons else "")


def _table(rows: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> Iterator[str]:
    """Names beside texts, which go on below themselves."""
    rows = list(rows) or [("nothing", "")]
    for name, text in rows:
        first, *more = textwrap.wrap(text, WIDTH - 24) or [""]
        yield f"  {name:<20}  {first}".rstrip()
        yield from (" " * 24 + line for line in more)


if __name__ == "__main__":
    sys.exit(main())
