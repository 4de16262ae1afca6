"""Text from a trained model: which token comes next, token by token, for several prompts at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_ds.cli import arg
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.training.inference import Inputs, Trained, from_last_stage, run, whole_vocabulary

PADDING = 0
"""Fills rows up to the longest; nothing that is read ever sees it."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Choice of tokens."""

    max_new_tokens: int = arg(100, "At most so many per prompt; the end of the document ends it earlier.", metavar="N")
    temperature: float = arg(0.8, "0 takes the likeliest token.")
    top_k: int = arg(40, "Draw from the K likeliest tokens; 0: all.", metavar="K")
    top_p: float = arg(1.0, "Draw from the likeliest tokens that together have probability P.", metavar="P")
    seed: int = arg(1234, "Prompt i (from 0) draws with seed + i, whatever the others are.")


def distribution(logits: torch.Tensor, config: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that may come next, likeliest first, and their probabilities: first the temperature, then K, then P.

    Shapes: logits [v] -> ids [n], probabilities [n]
    Source: Holtzman et al. 2019, arXiv:1904.09751, sec. 3.1 (top-p)
    """
    best = logits.topk(min(config.top_k or len(logits), len(logits)))
    weights = (best.values / config.temperature).softmax(-1)
    likelier = weights.cumsum(-1) - weights
    kept = int((likelier < config.top_p).sum()) if config.top_p < 1 else len(weights)
    return best.indices[:kept], weights[:kept] / weights[:kept].sum()


def choose(logits: torch.Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """The next token.

    Shapes: logits [v]
    """
    if config.temperature == 0:
        return int(logits.argmax())
    ids, probabilities = distribution(logits, config)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


class Ids(NamedTuple):
    """Of a tokenizer: the id that ends a text, and how many ids mean one; a model may have some more."""

    end: int
    size: int


def continue_prompts(
    trained: Trained, prompts: Sequence[Sequence[int]], config: SamplingConfig, ids: Ids, first: int = 0
) -> list[list[int]]:
    """What a GPT adds to each prompt, without the end that stopped it, on every rank.

    Each token is computed anew from the last `seq_length` ones. Rows are padded on the right, where causal attention
    does not look, so that a prompt's text does not depend on the others beside it.
    first: number of the first prompt, for its seed.
    Raises: ConfigError for numbers that mean nothing, DataError for ids that the model does not have
    """

    def inputs(active: Sequence[int], added: list[list[int]]) -> tuple[Inputs, list[int]]:
        windows = [[*prompts[i], *added[i]][-trained.seq_length :] for i in active]
        return Inputs(padded(windows)), [len(window) - 1 for window in windows]

    _check(trained, prompts, config)
    return _generate(trained, len(prompts), inputs, config, ids, first, config.max_new_tokens)


def answer_prompts(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    ids: Ids,
    first: int = 0,
    *,
    start: int,
) -> list[list[int]]:
    """What T5's decoder, begun with `start`, writes to each encoder input, without the end that stopped it.

    Raises: as continue_prompts, and DataError for a prompt that is longer than the model's positions
    """
    _check(trained, prompts, config)
    encoder = padded(prompts)
    documents = torch.tensor([[int(i >= len(prompt)) for i in range(encoder.shape[1])] for prompt in prompts])
    room = config.max_new_tokens
    if trained.config.positions == "learned_absolute":
        room = min(room, trained.max_positions)
        if encoder.shape[1] > trained.max_positions:
            found, expected = f"{encoder.shape[1]} tokens", f"at most {trained.max_positions}"
            raise DataError("--prompt", found, expected, "a shorter prompt")

    def inputs(active: Sequence[int], added: list[list[int]]) -> tuple[Inputs, list[int]]:
        decoder = [[start, *added[i]] for i in active]
        rows = list(active)
        batch = Inputs(encoder[rows], documents=documents[rows], decoder_input_ids=padded(decoder))
        return batch, [len(row) - 1 for row in decoder]

    return _generate(trained, len(prompts), inputs, config, ids, first, room)


def _generate(
    trained: Trained,
    count: int,
    inputs: Callable[[Sequence[int], list[list[int]]], tuple[Inputs, list[int]]],
    config: SamplingConfig,
    ids: Ids,
    first: int,
    room: int,
) -> list[list[int]]:
    """The loop over tokens: the last stage chooses, all stages learn of it."""
    generators = [torch.Generator().manual_seed(config.seed + first + i) for i in range(count)]
    added: list[list[int]] = [[] for _ in range(count)]
    active = list(range(count))
    for _ in range(room):
        if not active:
            break
        batch, ends = inputs(active, added)
        logits = next_logits(trained, batch, ends)
        chosen = torch.zeros(len(active), dtype=torch.int64, device=trained.device)
        if trained.has_outputs:
            for row, i in enumerate(active):
                chosen[row] = choose(logits[row, : ids.size], config, generators[i])
        for i, token in zip(list(active), from_last_stage(chosen, trained.parallel.pp).tolist(), strict=True):
            if token == ids.end:
                active.remove(i)
            else:
                added[i].append(token)
    return added


def next_logits(trained: Trained, batch: Inputs, ends: Sequence[int]) -> torch.Tensor:
    """Logits after position `ends[i]` of each row i, on the CPU; nothing but on the last stage.

    Shapes: -> [b, v]
    """
    found: list[torch.Tensor] = []

    def collect(number: int, output: Any) -> None:
        rows = torch.arange(len(ends), device=trained.device)
        found.append(whole_vocabulary(output[torch.tensor(ends, device=trained.device), rows], trained).cpu())

    run(trained, [batch], collect)
    return found[0] if found else torch.empty(0)


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of different lengths as one tensor, filled up on the right.

    Shapes: -> [b, s]
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows])


def _check(trained: Trained, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> None:
    numbers = {
        "--max-new-tokens": config.max_new_tokens,
        "--temperature": config.temperature,
        "--top-k": config.top_k,
    }
    for flag, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ConfigError(flag, str(value), "a finite number, 0 or more", f"{flag} 0, or leave it out")
    if not 0 < config.top_p <= 1:
        raise ConfigError("--top-p", str(config.top_p), "more than 0, at most 1", "leave it out")
    for prompt in prompts:
        outside = [token for token in prompt if not 0 <= token < trained.vocab.size]
        if outside or not prompt:
            found = f"token id {outside[0]}" if outside else "no tokens"
            raise DataError("--prompt", found, f"ids from 0 to {trained.vocab.size - 1}", "another prompt")
