#!/usr/bin/env python3
"""Print text that a trained model writes: tools/generate.py --load runs/gpt/checkpoints --prompt "def ".

Reads a checkpoint of any layout; model and tokenizer are the ones that it names.
"""

from __future__ import annotations

import argparse
import sys

from megatron_ds.errors import UserError
from megatron_ds.training.inference import generate, load_trained


def main() -> int:
    """Load, continue the prompt, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="DIR", help="Directory that --save wrote to.")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="This iteration, not the latest.")
    parser.add_argument("--prompt", default="", help="Text to continue. Default: the start of a document.")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token. Default: 0.8.")
    parser.add_argument("--top-k", type=int, default=40, help="Draw from the K likeliest tokens; 0: all. Default: 40.")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    try:
        trained = load_trained(options.load, options.ckpt_step, options.device)
        prompt = trained.tokenizer.tokenize(options.prompt) or [trained.tokenizer.eod]
        ids = generate(
            trained,
            prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
        )
    except UserError as error:
        print(f"error: {error.render()}", file=sys.stderr)
        return error.exit_code
    print(options.prompt + trained.tokenizer.detokenize(ids[len(prompt) :] if options.prompt else ids[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
