"""Weights between formats: ours, Hugging Face's, Megatron's; used by tools only, never while training."""
