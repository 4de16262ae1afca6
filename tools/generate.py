#!/usr/bin/env python3
"""Print text that a trained model writes.

    python tools/generate.py --load runs/gpt/checkpoints --prompt "def "

GPT continues a prompt; T5 answers it, and where the prompt holds <extra_id_0>, <extra_id_1> ... puts text in their
places. Reads a checkpoint of any layout on any layout; model and tokenizer are the ones that it names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A clone that was never installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ds import log
from megatron_ds.cli import Parser, arg
from megatron_ds.data.tokenizer import Tokenizer
from megatron_ds.errors import EXIT_OK, ConfigError, DataError
from megatron_ds.training.inference import InferenceConfig, Trained, check_output, guarded, open_checkpoint
from megatron_ds.training.sampling import Ids, SamplingConfig, answer_prompts, continue_prompts

SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Prompts."""

    prompt: str = arg("", "Text to continue. By default the start of a document.", metavar="TEXT")
    prompts: str | None = arg(
        None, "A prompt per line; of a .jsonl the text under `prompt` or `text`. Prints JSON lines.", metavar="FILE"
    )
    output: str | None = arg(None, "Write JSON lines here: prompt, text, tokens.", metavar="FILE")
    batch_size: int = arg(8, "Prompts at a time; none changes another one's text.")
    decoder_start_token_id: int | None = arg(
        None, "T5: begins the decoder. Default: the tokenizer's bos, or else its pad."
    )


def read_prompts(config: PromptConfig) -> list[str]:
    """The prompts that the flags name.

    Raises: DataError for a missing or empty file, or a line that holds no prompt
    """
    if config.prompts is None:
        return [config.prompt]
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--prompts {config.prompts}", str(error), "a file of UTF-8 text", "correct the path"
        ) from error
    is_json = config.prompts.endswith((".jsonl", ".json"))
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_of_json(line, f"{config.prompts}, line {number}") if is_json else line for number, line in kept]
    if not prompts:
        raise DataError(f"--prompts {config.prompts}", "no prompt", "one per line", 'or leave it out: --prompt ""')
    return prompts


def _of_json(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(where, f"no JSON: {error}", '{"prompt": "..."}', "an object per line") from error
    found = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    if not isinstance(found, str):
        raise DataError(where, "no string under prompt or text", '{"prompt": "..."}', "an object per line")
    return found


def complete(
    trained: Trained, tokenizer: Tokenizer, prompts: Sequence[str], first: int, config: SamplingConfig
) -> list[dict[str, Any]]:
    """What a GPT makes of some prompts; `first` is the number of the first one."""
    ids = [tokenizer.tokenize(prompt) or [tokenizer.eod] for prompt in prompts]
    added = continue_prompts(trained, ids, config, Ids(tokenizer.eod, tokenizer.vocab_size), first)
    return [
        {"prompt": prompt, "text": prompt + _continuation(tokenizer, before, after), "tokens": after}
        for prompt, before, after in zip(prompts, ids, added, strict=True)
    ]


def _continuation(tokenizer: Tokenizer, before: list[int], after: list[int]) -> str:
    """The text of new ids: some tokenizers drop the blank in front of a text that stands alone."""
    start, whole = tokenizer.detokenize(before), tokenizer.detokenize(before + after)
    return whole.removeprefix(start) if whole.startswith(start) else tokenizer.detokenize(after)


def answer(
    trained: Trained,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    first: int,
    config: SamplingConfig,
    start: int | None,
) -> list[dict[str, Any]]:
    """What T5 makes of some prompts; `first` is the number of the first one."""
    ids = [encoder_ids(prompt, tokenizer) for prompt in prompts]
    trained_with = trained.state.get("decoder_start_token_id")
    begin = next((token for token in (start, trained_with) if token is not None), None)
    begin = _decoder_start(tokenizer) if begin is None else begin
    added = answer_prompts(trained, ids, config, Ids(tokenizer.eos, tokenizer.vocab_size), first, start=begin)
    return [
        {"prompt": prompt, "text": filled(prompt, after, tokenizer), "tokens": after}
        for prompt, after in zip(prompts, added, strict=True)
    ]


def _decoder_start(tokenizer: Tokenizer) -> int:
    try:
        return tokenizer.bos
    except DataError:
        return tokenizer.pad


def encoder_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt whose sentinels stand for themselves, with an end if the tokenizer gives its texts one.

    Raises: DataError for a sentinel that the vocabulary lacks
    """
    parts = SENTINEL.split(prompt)
    numbers = [int(number) for number in parts[1::2]]
    if any(number >= len(tokenizer.sentinels) for number in numbers):
        found, expected = f"<extra_id_{max(numbers)}>", f"{len(tokenizer.sentinels)} of them in the vocabulary"
        raise DataError("--prompt", found, expected, "lower numbers, or train with --vocab-extra-ids 100")
    ids: list[int] = []
    for place, text in enumerate(tokenizer.tokenize_batch(parts[::2], bare=True)):
        ids += text
        ids += [tokenizer.sentinels[numbers[place]]] if place < len(numbers) else []
    ends = tokenizer.tokenize("")[-1:]
    return ids + (ends if ends == [tokenizer.eos] else [])


def filled(prompt: str, answer: Sequence[int], tokenizer: Tokenizer) -> str:
    """The prompt with the text behind each sentinel of the answer in its place; without sentinels, the answer."""
    if not SENTINEL.search(prompt):
        return tokenizer.detokenize(answer)
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in answer:
        if token in tokenizer.sentinels:
            span = spans.setdefault(tokenizer.sentinels.index(token), [])
        else:
            span.append(token)
    return SENTINEL.sub(lambda found: tokenizer.detokenize(spans.get(int(found[1]), [])).strip(), prompt)


def _batches(
    trained: Trained, prompts: Sequence[str], config: PromptConfig, sampling: SamplingConfig
) -> Iterator[dict[str, Any]]:
    tokenizer = trained.tokenizer()
    for first in range(0, len(prompts), config.batch_size):
        some = prompts[first : first + config.batch_size]
        if trained.config.model_type == "T5":
            yield from answer(trained, tokenizer, some, first, sampling, config.decoder_start_token_id)
        else:
            yield from complete(trained, tokenizer, some, first, sampling)


def work(argv: Sequence[str]) -> int:
    """Load, continue the prompts, print; the exit code."""
    parser = Parser("generate.py", (__doc__ or "").splitlines()[0])
    for group in (PromptConfig, SamplingConfig, InferenceConfig):
        parser.add_config(group)
    typed = parser.read(argv)
    (config,) = parser.build([PromptConfig], typed, {})
    (sampling,) = parser.build([SamplingConfig], typed, {})
    (options,) = parser.build([InferenceConfig], typed, {})
    if config.batch_size < 1:
        raise ConfigError("--batch-size", str(config.batch_size), "1 or more", "leave it out")
    check_output("--output", config.output)
    prompts = read_prompts(config)
    trained = open_checkpoint(options)
    if trained.config.model_type == "BERT":
        found, expected = "a BERT, which writes no text", "a GPT or a T5"
        raise ConfigError(f"--load {options.load}", found, expected, "tools/forward.py gives a BERT's predictions")
    writes = log.rank() == 0 and config.output is not None
    with open(str(config.output), "w", encoding="utf-8") if writes else nullcontext() as file:
        for row in _batches(trained, prompts, config, sampling):
            line = json.dumps(row, ensure_ascii=False)
            if file is not None:
                print(line, file=file, flush=True)
            elif config.output is None:
                log.info(row["text"] if config.prompts is None else line)
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; its exit code."""
    return guarded(lambda: work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
