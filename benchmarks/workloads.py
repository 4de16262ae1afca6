"""What is trained: models and batches of every benchmark, and the optimizer's settings, the same for all sides."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Model = Literal["gpt", "bert", "t5", "llama"]
Batch = tuple[Tensor, ...]
"""GPT, Llama: tokens, labels. BERT: tokens, token_types, labels, loss_mask, documents, is_random. T5: encoder_tokens,
decoder_tokens, labels, encoder_documents. The first dim of each is the global batch; documents are 1 at padding."""

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_GRAD = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
MASKED_SHARE = 0.15
"""Of a BERT sample's positions; each sample has as many, so that a mean over micro-batches is the global one."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model without dropout and with a tied head, and its batch.

    model: gpt is GPT-2 (learned positions, biases), bert as published (post-LN, erf GELU), t5 is 1.0 (RMSNorm, relative
    positions, ReLU), llama has RMSNorm, SwiGLU, rope and grouped queries. layers: of T5 those of each stack.
    kv_heads, ffn: of llama.
    """

    name: str
    model: Model = "gpt"
    layers: int
    hidden: int
    heads: int
    seq: int
    decoder_seq: int = 0
    vocab: int
    kv_heads: int = 0
    ffn: int = 0
    micro: int
    global_: int

    @property
    def micro_batches(self) -> int:
        """Gradient accumulation steps on one process."""
        return self.global_ // self.micro

    @property
    def tokens_per_sample(self) -> int:
        """Positions, of T5 in both stacks."""
        return self.seq + self.decoder_seq

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.global_ * self.tokens_per_sample

    @property
    def all_layers(self) -> int:
        """Layers of all stacks."""
        return self.layers * (2 if self.model == "t5" else 1)

    def formula_flops_per_token(self, parameters: int) -> int:
        """6N + 12 L s h, the convention of published figures for decoders."""
        return 6 * parameters + 12 * self.layers * self.seq * self.hidden

    def least_bytes_per_step(self, parameters: int, itemsize: int) -> int:
        """What a step cannot keep in caches: weights read twice and gradients added in fp32 for each micro-batch, 17
        tensors of activations a layer and three of logits written and read, and AdamW's seven passes in fp32.

        Source: Korthikanti et al. 2022, arXiv:2205.05198, eq. 2, without attention's matrix and masks
        """
        per_micro = parameters * (2 * itemsize + 8)
        per_token = 2 * 17 * itemsize * self.all_layers * self.hidden + 3 * itemsize * self.vocab
        adamw = parameters * (28 + (itemsize if itemsize < 4 else 0))
        return self.micro_batches * per_micro + self.tokens_per_step * per_token + adamw


W1 = Workload(name="W1", layers=6, hidden=512, heads=8, seq=256, vocab=50304, micro=4, global_=8)
W2 = Workload(name="W2", layers=12, hidden=512, heads=8, seq=256, vocab=8192, micro=2, global_=8)
B2 = dataclasses.replace(W2, name="B2", model="bert")
T2 = dataclasses.replace(W2, name="T2", model="t5", layers=6, decoder_seq=64)
G1 = Workload(name="G1", layers=24, hidden=1024, heads=16, seq=1024, vocab=50304, micro=8, global_=32)
"""GPT-2 medium, for one GPU."""
G13 = Workload(name="G1.3B", layers=24, hidden=2048, heads=16, seq=2048, vocab=50304, micro=4, global_=32)
L1 = Workload(
    name="L1B", model="llama", layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, seq=2048, vocab=128256,
    micro=4, global_=32,
)  # fmt: skip
L1S = dataclasses.replace(L1, name="L1B-32k", vocab=32000)
"""For GPUs on which the large vocabulary leaves no room."""
TINY = Workload(name="tiny", layers=2, hidden=64, heads=4, seq=32, vocab=512, micro=2, global_=4)
"""For trying the benchmark itself, as the next ones."""
TINY_BERT = dataclasses.replace(TINY, name="tiny-bert", model="bert")
TINY_T5 = dataclasses.replace(TINY, name="tiny-t5", model="t5", decoder_seq=16)
TINY_LLAMA = dataclasses.replace(TINY, name="tiny-llama", model="llama", kv_heads=2, ffn=128)
WORKLOADS = {w.name: w for w in (W1, W2, B2, T2, G1, G13, L1, L1S, TINY, TINY_BERT, TINY_T5, TINY_LLAMA)}
DEFAULTS: dict[str, str] = {"gpt": "W2", "bert": "B2", "t5": "T2", "llama": "L1B"}
"""The workload that stands for a model."""


def random_batch(workload: Workload, seed: int = 0) -> Batch:
    """Uniformly random tokens; half of what BERT and T5 read is padded by up to a quarter."""
    generator = torch.Generator().manual_seed(seed)
    w, shape = workload, (workload.global_, workload.seq)
    if w.model in ("gpt", "llama"):
        text = torch.randint(w.vocab, (w.global_, w.seq + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()
    tokens = torch.randint(1, w.vocab, shape, generator=generator)
    lengths = torch.full((w.global_, 1), w.seq)
    lengths[::2] = torch.randint(w.seq * 3 // 4, w.seq + 1, (len(lengths[::2]), 1), generator=generator)
    documents = (torch.arange(w.seq) >= lengths).long()
    if w.model == "t5":
        text = torch.randint(1, w.vocab, (w.global_, w.decoder_seq + 1), generator=generator)
        return tokens, text[:, :-1].contiguous(), text[:, 1:].contiguous(), documents
    order = torch.rand(shape, generator=generator).masked_fill(documents.bool(), 2.0).argsort(dim=1)
    loss_mask = torch.zeros(shape).scatter_(1, order[:, : round(MASKED_SHARE * w.seq)], 1.0)
    labels = torch.randint(1, w.vocab, shape, generator=generator) * loss_mask.long()
    types = (torch.arange(w.seq) >= lengths // 2).long()
    is_random = torch.randint(2, (w.global_,), generator=generator)
    return tokens.masked_fill(documents.bool(), 0), types, labels, loss_mask, documents, is_random
