"""Flags of saving and loading."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ds.cli import arg


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = arg(None, "Directory to save checkpoints to; all nodes must see the same one.", metavar="DIR")
    load: str | None = arg(
        None,
        "Directory to resume from, whatever the layout that saved it. Without a checkpoint this is an error, "
        "unless it is also --save: then the run starts from scratch.",
        metavar="DIR",
    )
    exit_on_missing_checkpoint: bool = arg(
        False, "Without a checkpoint in --load leave with an error, even if it is also --save."
    )
    use_checkpoint_args: bool = arg(
        False, "Take model and tokenizer from the checkpoint in --load, whatever else was typed about them."
    )
    save_interval: int | None = arg(
        None, "Iterations between two saves.", "--save-interval", "--persistent-save-interval", metavar="N"
    )
    ckpt_step: int | None = arg(None, "Load this iteration, not the latest.", metavar="N")
    finetune: bool = arg(False, "Load the weights only and start at iteration 0.")
    save_optim: bool = arg(True, "Leave the optimizer state out of what is saved.")
    load_optim: bool = arg(True, "Start the optimizer afresh: load no state of it.")
