"""What a user would train on one process instead: nanoGPT's model, and transformers.

The forward of each takes the parts of a batch (workloads.py) and returns the mean loss; peer.PeerStep trains them all
alike: accumulation, clipping, fused AdamW on two groups, autocast for bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peer import PeerStep
from benchmarks.peers_common import initial_weights
from benchmarks.peers_models import build_peer
from benchmarks.workloads import Workload

PEERS: dict[str, tuple[str, ...]] = {
    "gpt": ("torch", "torch compiled", "nanoGPT", "transformers", "transformers compiled"),
    "bert": ("torch", "torch compiled", "transformers", "transformers compiled"),
    "t5": ("torch", "torch compiled", "transformers", "transformers compiled"),
    "llama": ("torch", "torch compiled"),
}


def build(side: str, workload: Workload, dtype: torch.dtype, device: str, weights: Path | None) -> PeerStep:
    """A peer that starts from the common weights, or without a file from weights of its own."""
    kind, _, compiled = side.partition(" ")
    makers: dict[str, Callable[[Workload], nn.Module]] = {"nanoGPT": NanoGPT, "transformers": Transformers}
    with torch.device("cpu" if weights else device):
        model = makers.get(kind, build_peer)(workload)
    if weights:
        values = initial_weights(weights)
        adopt = getattr(model, "adopt", None)
        model.load_state_dict(values) if adopt is None else adopt(values)
    return PeerStep(workload, dtype, compiled == "compiled", device, model=model)


class NanoGPT(nn.Module):
    """A GPT as nanoGPT's model.py builds it: modules within modules, a dropout of 0 where it has one, no padding."""

    def __init__(self, w: Workload):
        super().__init__()
        parts = {"wte": nn.Embedding(w.vocab, w.hidden), "wpe": nn.Embedding(w.seq, w.hidden), "drop": nn.Dropout(0.0)}
        blocks = {"h": nn.ModuleList(NanoBlock(w) for _ in range(w.layers)), "ln_f": nn.LayerNorm(w.hidden)}
        self.transformer = nn.ModuleDict(parts | blocks)
        self.lm_head = nn.Linear(w.hidden, w.vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Shapes: [b, s], [b, s] -> []"""
        t: Any = self.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = t["drop"](t["wte"](tokens) + t["wpe"](positions))
        for block in t["h"]:
            x = block(x)
        logits = self.lm_head(t["ln_f"](x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-1)

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Take the plain GPT's weights."""
        names = {
            "blocks.": "transformer.h.", ".qkv.": ".attn.c_attn.", ".proj.": ".attn.c_proj.", ".fc_1.": ".mlp.c_fc.",
            ".fc_2.": ".mlp.c_proj.", "words.": "transformer.wte.", "positions.": "transformer.wpe.",
            "ln_f.": "transformer.ln_f.",
        }  # fmt: skip
        found = {}
        for name, value in weights.items():
            for theirs, mine in names.items():
                name = name.replace(theirs, mine)
            found[name] = value
        self.load_state_dict(found | {"lm_head.weight": weights["words.weight"]})


class NanoBlock(nn.Module):
    """Attention and MLP, each with a norm before it and a dropout behind it."""

    def __init__(self, w: Workload):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(w.hidden), nn.LayerNorm(w.hidden)
        self.attn, self.mlp = NanoAttention(w), NanoMLP(w)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [b, s, h] -> [b, s, h]"""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class NanoAttention(nn.Module):
    """Causal attention with one matrix for queries, keys and values."""

    def __init__(self, w: Workload):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(w.hidden, 3 * w.hidden), nn.Linear(w.hidden, w.hidden)
        self.resid_dropout, self.heads, self.width = nn.Dropout(0.0), w.heads, w.hidden

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [b, s, h] -> [b, s, h]"""
        b, s, h = x.shape
        q, k, v = (
            part.view(b, s, self.heads, h // self.heads).transpose(1, 2) for part in self.c_attn(x).split(h, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        out: Tensor = self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, s, h)))
        return out


class NanoMLP(nn.Module):
    """Four times as wide, with GELU in its tanh form, as all sides have it."""

    def __init__(self, w: Workload):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(w.hidden, 4 * w.hidden), nn.Linear(4 * w.hidden, w.hidden)
        self.gelu, self.dropout = nn.GELU(approximate="tanh"), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [b, s, h] -> [b, s, h]"""
        out: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return out


class Transformers(nn.Module):
    """GPT2LMHeadModel, BertForPreTraining or T5ForConditionalGeneration, attention through SDPA."""

    def __init__(self, w: Workload):
        super().__init__()
        import transformers

        from benchmarks.ours import arguments
        from megatron_ds.config import parse
        from megatron_ds.convert.bert import BERT
        from megatron_ds.convert.gpt2 import GPT2
        from megatron_ds.convert.t5 import T5

        self.kind = w.model
        self.family = {"gpt": GPT2, "bert": BERT, "t5": T5}[w.model]
        self.shape = parse(arguments(w, "fp32", "cpu"), {"model_type": self.family.of}).model
        make = getattr(transformers, self.family.name)
        config = make.config_class(**self.family.fields(self.shape, w.seq), vocab_size=w.vocab, use_cache=False)
        config._attn_implementation = "sdpa"
        self.model = make(config)

    def forward(self, *parts: Tensor) -> Tensor:
        """The class's own loss."""
        if self.kind == "gpt":
            tokens, labels = parts
            loss: Tensor = self.model(tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        elif self.kind == "bert":
            tokens, types, labels, loss_mask, documents, is_random = parts
            targets = labels.masked_fill(loss_mask == 0, -100)
            loss = self.model(tokens, 1 - documents, types, labels=targets, next_sentence_label=is_random).loss
        else:
            source, target, labels, documents = parts
            loss = self.model(
                source, attention_mask=1 - documents, decoder_input_ids=target, labels=labels, use_cache=False
            ).loss
        return loss

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Take the common weights by the converter's table of names.

        Raises: RuntimeError if a tensor gets no value
        """
        from benchmarks.ours import peer_name

        found: dict[str, Tensor] = {}
        for rule in self.family.rules(self.shape):
            value = weights[peer_name(rule.ours) if self.kind == "gpt" else rule.ours]
            found |= zip(rule.theirs, rule.to_theirs(value), strict=True)
        left = self.model.load_state_dict(found, strict=False)
        missing = [name for name in left.missing_keys if name not in dict(self._tied())]
        if missing or left.unexpected_keys:
            raise RuntimeError(f"no value for {missing}, no place for {left.unexpected_keys}")

    def _tied(self) -> list[tuple[str, Tensor]]:
        """Second names of a parameter that has several."""
        names, once = self.model.named_parameters(remove_duplicate=False), dict(self.model.named_parameters())
        return [(name, value) for name, value in names if name not in once]
