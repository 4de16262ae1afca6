"""Rules of recomputation and of where its kept inputs lie."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.config import Config
from megatron_ds.errors import ConfigError
from megatron_ds.ways import Ways, either

FULL = "--recompute-granularity full"


def check_recompute(config: Config) -> Iterator[ConfigError]:
    """One granularity under all its names, with no option that belongs to the other."""
    recompute = config.recompute
    full = recompute.checkpoint_activations or recompute.activations_checkpoint_method is not None
    asked = {recompute.recompute_granularity, "selective" if recompute.recompute_activations else None}
    asked |= {"full" if full else None}
    if len(asked - {None}) > 1:
        yield ConfigError(
            "--recompute-granularity", "full and selective, under two names", "one of them", f"only {FULL}"
        )
        return
    if None not in (recompute.recompute_method, recompute.activations_checkpoint_method) and (
        recompute.recompute_method != recompute.activations_checkpoint_method
    ):
        yield ConfigError(
            "--recompute-method and --activations-checkpoint-method",
            f"{recompute.recompute_method} and {recompute.activations_checkpoint_method}",
            "one method: they are two names of the same thing",
            "leave one of them out",
        )
    options = {
        "--recompute-method": recompute.recompute_method,
        "--recompute-num-layers": recompute.recompute_num_layers,
        "--distribute-saved-activations": recompute.distribute_saved_activations or None,
        "--checkpoint-in-cpu": recompute.checkpoint_in_cpu or None,
    }
    given = [flag for flag, value in options.items() if value is not None]
    if given and recompute.granularity != "full":
        what = f"{recompute.granularity} recomputation" if recompute.granularity else "no recomputation"
        flags = ", ".join(given)
        full_too = "" if recompute.recompute_activations else FULL
        yield ConfigError(flags, what, f"{FULL}, to which it belongs", either(full_too, f"leave {flags} out"))
    elif recompute.num_layers > config.model.total_layers:
        yield ConfigError(
            "--recompute-num-layers",
            f"{recompute.num_layers}, of {config.model.total_layers} layers",
            "at most all layers",
            f"--recompute-num-layers {config.model.total_layers}",
        )


def check_distribution(config: Config, world_size: int, ways: Ways) -> Iterator[ConfigError]:
    """Kept inputs are cut over tp, unless they are cut already."""
    tp, cut = config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel
    lengths = (config.data.seq_length or 1) // max(1, config.parallel.context_size), config.data.decoder_seq_length or 0
    kept = [length * (config.training.micro_batch_size or 1) * (config.model.hidden_size or 1) for length in lengths]
    uneven = [elements for elements in kept if elements % tp]
    if not config.recompute.distribute_saved_activations or (tp > 1 and not cut and not uneven):
        return
    found, expected = "--sequence-parallel beside it", "one of them: with --sequence-parallel they are cut already"
    if tp == 1:
        found, expected = "--tensor-model-parallel-size 1", "ranks over which to cut the kept inputs"
    elif not cut:
        found, expected = f"{uneven[0]} elements to keep, over {tp} ranks", "a kept input that divides by tp"
    yield ConfigError(
        "--distribute-saved-activations",
        found,
        expected,
        either(ways.layouts, "leave --distribute-saved-activations out"),
    )
