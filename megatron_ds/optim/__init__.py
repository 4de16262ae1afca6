"""One step of ZeRO: buckets, gradient norm, AdamW on shards, learning rates."""
