#!/usr/bin/env python3
"""Convert weights between Hugging Face, Megatron and megatron_ds, and prove the result.

    tools/convert_checkpoint.py --model-type GPT --loader hf --saver megatron_ds --load-dir Llama-3-8B --save-dir llama
    tools/convert_checkpoint.py --model-type GPT --loader megatron_ds --saver hf --load-dir runs/gpt --save-dir export

Both sides then run on the same prompts in fp32; the largest difference of two logits is printed, and above 1e-4 nothing
is kept. In full: docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_ds import log
from megatron_ds.convert.homes import find_home, folded
from megatron_ds.convert.hub import load_hf, save_hf
from megatron_ds.convert.megatron import load_megatron
from megatron_ds.convert.native import load_native, save_native
from megatron_ds.convert.proof import TOLERANCE, difference, same_ids
from megatron_ds.convert.tokenizer_files import keep, write_out
from megatron_ds.convert.weights import Weights
from megatron_ds.data.tokenizer import build_tokenizer
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.training.inference import guarded

_NO_EFFECT = {
    "--target-tensor-parallel-size": "our checkpoints fit every layout",
    "--target-pipeline-parallel-size": "our checkpoints fit every layout",
    "--max-queue-size": "loader and saver are one process, and tensors are read one by one",
    "--megatron-path": "Megatron's code is not needed to read its files",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--model-type", required=True, choices=("GPT", "BERT", "T5"))
    out.add_argument(
        "--loader", required=True, choices=("hf", "megatron", "megatron_ds"), help="What --load-dir holds."
    )
    out.add_argument("--saver", required=True, choices=("megatron_ds", "hf"), help="What to write.")
    out.add_argument("--load-dir", required=True, type=Path, metavar="DIR")
    out.add_argument("--save-dir", required=True, type=Path, metavar="DIR", help="Must be new or empty.")
    out.add_argument("--ckpt-step", type=int, metavar="N", help="This iteration, not the latest.")
    out.add_argument(
        "--true-vocab-size", type=int, metavar="N", help="Rows of a Megatron vocabulary that are not padding."
    )
    out.add_argument("--no-check", action="store_true", help="Do not run both sides afterwards.")
    out.add_argument("--no-checking", action="store_true", help="Accepted: names of tensors are always checked.")
    for flag, why in _NO_EFFECT.items():
        out.add_argument(flag, metavar="X", help=f"Accepted, without effect: {why}.")
    return out


def convert(options: argparse.Namespace) -> None:
    """Load, write beside the target, prove, rename.

    Raises: UserError; the target is then as it was
    """
    target: Path = options.save_dir.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            "--save-dir", f"{target} is not empty", "a new directory", "another name; nothing is replaced"
        )
    weights = _load(options)
    if weights.config.model_type != options.model_type:
        found = weights.config.model_type
        raise ConfigError(f"--model-type {options.model_type}", f"a {found} in {options.load_dir}", found)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        staged, scratch = Path(beside) / "staged", Path(beside) / "scratch"
        staged.mkdir()
        scratch.mkdir()
        if options.saver == "hf":
            weights = folded(weights)
            save_hf(weights, staged)
            write_out(weights, staged)
        else:
            weights = keep(weights, staged, target)
            save_native(weights, staged)
        if options.no_check:
            log.info("not checked: --no-check")
        else:
            _prove(options, weights, staged, scratch)
        staged.rename(target)
    log.info(f"wrote {target}: {weights.config.model_type}, {len(weights.names)} tensors, {weights.dtype}")


def _load(options: argparse.Namespace) -> Weights:
    if options.loader == "hf":
        return load_hf(options.load_dir)
    if options.loader == "megatron_ds":
        return load_native(options.load_dir, options.ckpt_step)
    directory = options.load_dir
    if options.ckpt_step is not None:
        deepspeed = directory / f"global_step{options.ckpt_step}"
        directory = deepspeed if deepspeed.is_dir() else directory / f"iter_{options.ckpt_step:07d}"
    return load_megatron(str(directory), options.model_type, true_vocab_size=options.true_vocab_size)


def _prove(options: argparse.Namespace, weights: Weights, staged: Path, scratch: Path) -> None:
    """Run our side and transformers' where both exist or can be made.

    Raises: CheckpointError if they differ
    """
    ours, theirs = staged, options.load_dir
    if options.saver == "hf":
        ours, theirs = options.load_dir, staged
        if options.loader != "megatron_ds":
            ours = scratch
            save_native(weights, scratch)
    elif options.loader != "hf":
        try:
            find_home(folded(weights))
        except CheckpointError:
            log.info("not checked: no class of Hugging Face computes this model, so there is nothing to compare with")
            return
        theirs = scratch
        save_hf(weights, scratch)
    kind = find_home(folded(weights)).name
    step = options.ckpt_step if ours == options.load_dir else None
    worst = difference(ours, theirs, kind, loads_all=theirs != options.load_dir, step=step)
    log.info(f"largest logit difference from transformers' {kind} in fp32: {worst:.3g}")
    if not worst <= TOLERANCE:
        raise CheckpointError(
            str(options.save_dir),
            f"logits that differ by {worst:.3g} from {kind}",
            f"at most {TOLERANCE:g} in fp32",
            "nothing was written; this is a fault of the converter, unless the weights are not of that class",
        )
    if options.saver == "hf":
        _compare_tokenizers(weights, staged)


def _compare_tokenizers(weights: Weights, staged: Path) -> None:
    """Say whether the tokenizer that was written out does what ours does."""
    if not any((staged / name).exists() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
        log.info("the export has no tokenizer")
    elif weights.tokenizer and same_ids(build_tokenizer(weights.tokenizer), staged):
        log.info("AutoTokenizer gives the same ids as our tokenizer")
    else:
        log.warn("AutoTokenizer gives other ids than our tokenizer on some texts; see docs/conversion.md")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(argv)
    for flag, why in _NO_EFFECT.items():
        if vars(options)[flag[2:].replace("-", "_")] is not None:
            log.info(f"{flag} has no effect: {why}")

    def work() -> int:
        convert(options)
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
