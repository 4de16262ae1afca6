"""Learning rate and weight decay as pure functions of the samples consumed so far: nothing of it is ever saved.

The step that consumes samples [n, n + batch) uses the values at n, so the first step of a warm-up has its initial rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ds.errors import ConfigError
from megatron_ds.optim.config import LRConfig, OptimizerConfig


@dataclass(frozen=True)
class LRSchedule:
    """Every length in samples, whatever unit it was given in."""

    style: str
    max_lr: float
    min_lr: float
    warmup_init: float
    warmup_samples: float
    decay_samples: float
    wsd_style: str
    wsd_samples: float
    weight_decay_style: str
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_samples: float

    def lr_at(self, samples: int) -> float:
        """Learning rate of the step that starts after `samples` samples."""
        if self.warmup_samples > 0 and samples <= self.warmup_samples:
            return self.warmup_init + (self.max_lr - self.warmup_init) * samples / self.warmup_samples
        if self.style == "constant":
            return self.max_lr
        if samples > self.decay_samples:
            return self.min_lr
        if self.style == "inverse-square-root":
            lr = self.max_lr * math.sqrt(max(self.warmup_samples, 1) / max(samples, 1))
            return max(self.min_lr, lr)
        return self.min_lr + self._share(samples) * (self.max_lr - self.min_lr)

    def _share(self, samples: int) -> float:
        """How much of max_lr - min_lr is left: from 1 at the end of the warm-up to 0 at the end of the decay."""
        if self.style == "WSD":
            stable_until = self.decay_samples - self.wsd_samples
            if samples <= stable_until:
                return 1.0
            return _wsd_share(self.wsd_style, (samples - stable_until) / self.wsd_samples)
        done = (samples - self.warmup_samples) / (self.decay_samples - self.warmup_samples)
        return 1 - done if self.style == "linear" else _half_cosine(done)

    def weight_decay_at(self, samples: int) -> float:
        """Weight decay of the step that starts after `samples` samples."""
        if self.weight_decay_style == "constant" or samples > self.weight_decay_samples:
            return self.end_weight_decay
        done = samples / self.weight_decay_samples
        share = done if self.weight_decay_style == "linear" else _half_cosine(1 - done)
        return self.start_weight_decay + share * (self.end_weight_decay - self.start_weight_decay)


def _half_cosine(done: float) -> float:
    return 0.5 * (math.cos(math.pi * done) + 1)


def _wsd_share(style: str, done: float) -> float:
    """Share left within the final decay.

    Source: Hagele et al. 2024, arXiv:2405.18392 (minus_sqrt is its "1-sqrt")
    """
    if style == "linear":
        return 1 - done
    if style == "cosine":
        return _half_cosine(done)
    if style == "minus_sqrt":
        return 1 - math.sqrt(done)
    return 2 * math.pow(0.5, done) - 1


def lr_schedule(
    lr: LRConfig,
    optimizer: OptimizerConfig,
    train_samples: int | None,
    global_batch_size: int,
    train_iters: int | None,
) -> LRSchedule:
    """Turn flags that passed `lr_errors` into a schedule; one of `train_samples` and `train_iters` is given."""
    assert optimizer.lr is not None
    lengths = _lengths(lr, train_samples, global_batch_size, train_iters)
    constant = lr.weight_decay_incr_style == "constant"
    return LRSchedule(
        style=lr.lr_decay_style,
        max_lr=optimizer.lr,
        min_lr=lr.min_lr,
        warmup_init=lr.lr_warmup_init,
        warmup_samples=lengths.warmup,
        decay_samples=lengths.decay,
        wsd_style=lr.lr_wsd_decay_style,
        wsd_samples=lengths.wsd,
        weight_decay_style=lr.weight_decay_incr_style,
        start_weight_decay=_given(None if constant else lr.start_weight_decay, optimizer.weight_decay),
        end_weight_decay=_given(None if constant else lr.end_weight_decay, optimizer.weight_decay),
        weight_decay_samples=lengths.train,
    )


@dataclass(frozen=True)
class _Lengths:
    train: int
    decay: int
    warmup: float
    wsd: int


def _lengths(lr: LRConfig, train_samples: int | None, global_batch_size: int, train_iters: int | None) -> _Lengths:
    """All lengths in samples. A run counted in iterations takes the flags in iterations, and the other way round."""
    if train_samples is not None:
        train, unit = train_samples, 1
        decay, warmup, wsd = lr.lr_decay_samples, lr.lr_warmup_samples, lr.lr_wsd_decay_samples
    else:
        assert train_iters is not None
        train, unit = train_iters, global_batch_size
        decay, warmup, wsd = lr.lr_decay_iters, lr.lr_warmup_iters, lr.lr_wsd_decay_iters
    decay = train if decay is None else decay
    if lr.lr_warmup_fraction is None:
        return _Lengths(train * unit, decay * unit, warmup * unit, (wsd or 0) * unit)
    return _Lengths(train * unit, decay * unit, lr.lr_warmup_fraction * decay * unit, (wsd or 0) * unit)


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def lr_errors(
    lr: LRConfig,
    optimizer: OptimizerConfig,
    train_samples: int | None,
    global_batch_size: int,
    train_iters: int | None,
) -> list[ConfigError]:
    """Every rule between these flags that is broken; --train-iters against --train-samples is not one of them."""
    errors = [*_rate_errors(lr, optimizer), *_weight_decay_errors(lr)]
    if lr.lr_warmup_fraction is not None and (lr.lr_warmup_iters or lr.lr_warmup_samples):
        other = "--lr-warmup-iters" if lr.lr_warmup_iters else "--lr-warmup-samples"
        errors.append(ConfigError("--lr-warmup-fraction", f"given with {other}", "one of them", f"remove {other}"))
    if lr.lr_warmup_fraction is not None and not 0 <= lr.lr_warmup_fraction < 1:
        errors.append(ConfigError("--lr-warmup-fraction", str(lr.lr_warmup_fraction), "at least 0 and below 1"))
    if (train_samples is None) == (train_iters is None):
        return errors
    errors += _unit_errors(lr, in_samples=train_samples is not None)
    return errors or _length_errors(lr, train_samples, global_batch_size, train_iters)


def _rate_errors(lr: LRConfig, optimizer: OptimizerConfig) -> list[ConfigError]:
    if optimizer.lr is None:
        return [ConfigError("--lr", "no learning rate", "a positive number", "--lr 1e-4 is a cautious start")]
    errors = []
    if optimizer.lr < 0:
        errors.append(ConfigError("--lr", f"{optimizer.lr:g}", "0 or more"))
    for flag, value in (("--min-lr", lr.min_lr), ("--lr-warmup-init", lr.lr_warmup_init)):
        if not 0 <= value <= max(optimizer.lr, 0):
            expected = f"between 0 and --lr {optimizer.lr:g}"
            errors.append(ConfigError(flag, f"{value:g}", expected, f"lower {flag} or raise --lr"))
    return errors


def _weight_decay_errors(lr: LRConfig) -> list[ConfigError]:
    start, end = lr.start_weight_decay, lr.end_weight_decay
    if lr.weight_decay_incr_style == "constant":
        if start is None and end is None:
            return []
        return [
            ConfigError(
                "--start-weight-decay, --end-weight-decay",
                found="given while --weight-decay-incr-style is constant",
                expected="a style that moves",
                fix="--weight-decay-incr-style linear, or --weight-decay for a constant value",
            )
        ]
    if start is None or end is None or not 0 <= start <= end:
        return [
            ConfigError(
                f"--weight-decay-incr-style {lr.weight_decay_incr_style}",
                found=f"--start-weight-decay {start}, --end-weight-decay {end}",
                expected="both given, 0 <= start <= end",
                fix="give both, for instance --start-weight-decay 0.01 --end-weight-decay 0.1",
            )
        ]
    return []


def _unit_errors(lr: LRConfig, in_samples: bool) -> list[ConfigError]:
    """Lengths in the unit that the run is not counted in would be ignored, so they are refused."""
    used, other = ("samples", "iters") if in_samples else ("iters", "samples")
    values = {
        "iters": (lr.lr_decay_iters, lr.lr_warmup_iters, lr.lr_wsd_decay_iters),
        "samples": (lr.lr_decay_samples, lr.lr_warmup_samples, lr.lr_wsd_decay_samples),
    }
    return [
        ConfigError(
            f"{flag}-{other}",
            found=f"{value} with --train-{used}",
            expected="one unit for the whole run",
            fix=f"use {flag}-{used}, or --train-{other}",
        )
        for flag, value in zip(("--lr-decay", "--lr-warmup", "--lr-wsd-decay"), values[other], strict=True)
        if value
    ]


def _length_errors(
    lr: LRConfig, train_samples: int | None, global_batch_size: int, train_iters: int | None
) -> list[ConfigError]:
    lengths = _lengths(lr, train_samples, global_batch_size, train_iters)
    unit = "samples" if train_samples is not None else "iters"
    errors = []
    if lengths.decay <= 0:
        errors.append(ConfigError(f"--lr-decay-{unit}", f"{lengths.decay} samples", "a positive length"))
    elif not 0 <= lengths.warmup < lengths.decay:
        errors.append(
            ConfigError(
                f"--lr-warmup-{unit}",
                found=f"a warm-up of {lengths.warmup:g} samples in a decay of {lengths.decay}",
                expected="a warm-up shorter than --lr-decay (by default the whole training)",
                fix=f"shorten the warm-up, or raise --lr-decay-{unit} or --train-{unit}",
            )
        )
    if lr.lr_decay_style == "WSD" and not 0 < lengths.wsd <= lengths.decay - lengths.warmup:
        errors.append(
            ConfigError(
                f"--lr-wsd-decay-{unit}",
                found=f"a final decay of {lengths.wsd} samples",
                expected=f"between 1 and the {lengths.decay - lengths.warmup:g} samples after the warm-up",
                fix=f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, often a tenth of the training",
            )
        )
    return errors
