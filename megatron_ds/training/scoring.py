"""How well a GPT predicts given tokens: windows over long texts, losses of targets, and whether it would guess them.

    window    inputs   x0 x1 x2 x3     at most `length` of them
              targets  .  .  x3 x4     what the model should say after each input; . has been scored before

The vocabulary is never gathered: ranks of tensor parallelism share a loss as they do in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from megatron_ds.model.embedding import Vocab
from megatron_ds.model.loss import vocab_parallel_cross_entropy
from megatron_ds.parallel.collectives import all_reduce
from megatron_ds.parallel.context import Axis
from megatron_ds.training.inference import Inputs, Trained, run
from megatron_ds.training.sampling import padded

UNSCORED = -1


class Window(NamedTuple):
    """Inputs, and for each the token that should follow, or UNSCORED."""

    inputs: list[int]
    targets: list[int]


class Totals(NamedTuple):
    """Over all windows: the sum of -log p, how many targets there were, and the windows guessed without a mistake."""

    loss: float
    targets: int
    windows: int
    guessed: int


def windows(tokens: Sequence[int], length: int, stride: int, given: int = 1) -> Iterator[Window]:
    """Score every token after the first `given` once, `stride` at a time, each with as long a context as fits.

    The first window scores all that it holds; a later one reads `length` tokens again and scores the last `stride`.
    With stride = length texts are cut into pieces, of which the last reaches back as far as it can.
    """
    done = given
    while done < len(tokens):
        end = min(len(tokens), length + 1 if done == given else done + stride)
        end = max(end, done + 1)
        begin = max(0, end - 1 - length)
        unscored = done - begin - 1
        targets = [UNSCORED] * unscored + list(tokens[done:end])
        yield Window(list(tokens[begin : end - 1]), targets)
        done = end


def score(trained: Trained, todo: Iterable[Window], micro_batch_size: int) -> Totals:
    """Score windows on all ranks; data-parallel ones take turns.

    Comm: the stages' transfers; over tp per micro-batch the loss's two all-reduces and two more; at the end an
          all-reduce of 4 numbers over the world
    """
    parallel = trained.parallel
    sums = torch.zeros(4, dtype=torch.float64, device=trained.device)
    mine = islice(todo, parallel.dp.rank, None, parallel.dp.size)
    while several := list(islice(mine, micro_batch_size * parallel.pp.size)):
        _score_some(trained, several, micro_batch_size, sums)
    total = all_reduce(sums if trained.writes else torch.zeros_like(sums), parallel.world).tolist()
    return Totals(total[0], *map(int, total[1:]))


def _score_some(trained: Trained, several: list[Window], rows: int, sums: torch.Tensor) -> None:
    """Enough micro-batches to keep every stage busy."""
    parts = [several[first : first + rows] for first in range(0, len(several), rows)]
    labels = [_targets(part).to(trained.device) for part in parts]

    def collect(number: int, logits: Any) -> None:
        wanted = labels[number]
        scored = wanted != UNSCORED
        losses = vocab_parallel_cross_entropy(
            logits, wanted.clamp(min=0), trained.vocab, trained.parallel.tp
        ).masked_fill(~scored, 0.0)
        wrong = (likeliest(logits, trained.vocab, trained.parallel.tp) != wanted) & scored
        guessed = (~wrong.any(0)).sum()
        count = torch.tensor(wanted.shape[1], device=trained.device)
        sums.add_(torch.stack((losses.double().sum(), scored.sum(), count, guessed)))

    run(trained, [Inputs(padded([window.inputs for window in part])) for part in parts], collect)


def _targets(part: list[Window]) -> torch.Tensor:
    """Shapes: -> [s, b]"""
    longest = max(len(window.targets) for window in part)
    return torch.tensor([window.targets + [UNSCORED] * (longest - len(window.targets)) for window in part]).t()


def likeliest(logits: torch.Tensor, vocab: Vocab, tp: Axis) -> torch.Tensor:
    """The id with the largest logit.

    Shapes: [s, b, v/tp] -> [s, b]
    Comm:   all-reduces over tp, of the largest logit and of the lowest id that has it
    """
    first = tp.rank * logits.shape[-1]
    ids = torch.arange(first, first + logits.shape[-1], device=logits.device)
    value, index = logits.masked_fill(ids >= vocab.size, -torch.inf).float().max(-1)
    best = all_reduce(value.clone(), tp, "max")
    return all_reduce(torch.where(value == best, first + index, vocab.padded), tp, "min")
