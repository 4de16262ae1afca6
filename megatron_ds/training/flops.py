"""FLOPs of a model, counted from the modules that were built."""

from __future__ import annotations

from megatron_ds.training.run import Recipe, Run, Stage


def train_flops_per_sample(run: Run, recipe: Recipe) -> int:
    """Model FLOPs of one training step per sample, all ranks together: a backward costs two forwards.

    Matrix products only, attention without the causal half, padded vocabulary included.
    Source: Narayanan et al. 2021, arXiv:2104.04473, appendix
    """
    whole = Stage(0, run.config.model.total_layers, is_first=True, is_last=True)
    return 3 * recipe.model(run, whole).flops_per_sample(run.plan.lengths)
