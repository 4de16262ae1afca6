"""Bytes on disk to batches: tokenizer -> .bin/.idx -> index map -> dataset -> blend -> sampler -> loader."""
