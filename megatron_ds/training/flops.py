"""FLOPs of a model, counted from the modules that were built."""

from __future__ import annotations

from megatron_ds.model.gpt import Stage
from megatron_ds.training.run import Recipe, Run


def train_flops_per_token(run: Run, recipe: Recipe) -> int:
    """Model FLOPs of one training step per token, all ranks together: a backward costs two forwards.

    Matrix products only, attention without the causal half, padded vocabulary included.
    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix
    """
    layers = run.config.model.num_layers
    assert layers
    return 3 * recipe.model(run, Stage(0, layers, is_first=True, is_last=True)).flops_per_token(run.plan.seq_length)
