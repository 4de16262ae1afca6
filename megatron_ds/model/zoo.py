"""The three models by name."""

from __future__ import annotations

from typing import Any

from megatron_ds.model.bert import BertModel
from megatron_ds.model.chunk import ModelChunk, Stage
from megatron_ds.model.config import TransformerConfig
from megatron_ds.model.embedding import Vocab
from megatron_ds.model.gpt import GPTModel
from megatron_ds.model.t5 import T5Model


def build_model(config: TransformerConfig, vocab: Vocab, stage: Stage, **options: Any) -> ModelChunk:
    """One chunk of the model that the configuration names; `options` are those of ModelChunk."""
    models: dict[str, type[GPTModel | BertModel | T5Model]] = {"GPT": GPTModel, "BERT": BertModel, "T5": T5Model}
    return models[config.model_type](config, vocab, stage, **options)
