"""What to train on: the data and tokenizer flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ds.cli import arg


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    data_path: tuple[str, ...] = arg(
        (), "Prefix of a .bin/.idx pair, or a blend: w1 PREFIX1 w2 PREFIX2 ... (without weights: by size).", metavar="P"
    )
    train_data_path: tuple[str, ...] = arg(
        (), "As --data-path, for training only; with these three --split is ignored.", metavar="P"
    )
    valid_data_path: tuple[str, ...] = arg((), "As --data-path, for validation only.", metavar="P")
    test_data_path: tuple[str, ...] = arg((), "As --data-path, for the final test only.", metavar="P")
    split: str = arg("969, 30, 1", "Shares of documents for training, validation and test.", metavar="A,B,C")
    seq_length: int | None = arg(None, "Tokens of one sample.", "--seq-length", "--encoder-seq-length")
    decoder_seq_length: int | None = arg(None, "T5: tokens of one sample's decoder.")
    mask_prob: float = arg(0.15, "BERT, T5: share of the tokens that is masked.")
    short_seq_prob: float = arg(0.1, "BERT, T5: share of samples that are cut short.")
    noise_density: float | None = arg(
        None, "T5: mask spans as the paper does, this share of the tokens (0.15), not Megatron's whole words."
    )
    mean_noise_span_length: float | None = arg(None, "T5: the same, with spans of this mean length (3).")
    data_cache_path: str | None = arg(
        None, "Folder for the built indices; without it cache/GPTDataset_indices beside the data.", metavar="DIR"
    )
    num_workers: int = arg(2, "Threads that read samples ahead; 0 reads them when they are needed.")
    dataloader_type: Literal["single", "cyclic"] = arg(
        "single", "single: one pass in the dataset's order; cyclic: reshuffled epochs."
    )
    eod_mask_loss: bool = arg(False, "No loss where the input token is the end of a document.")
    reset_position_ids: bool = arg(False, "Positions count from 0 again after each end of document.")
    reset_attention_mask: bool = arg(False, "Tokens see only their own document; packed documents are as if alone.")
    shuffle: bool = arg(True, "Samples in the order of the files; of GPT sample i is tokens [i s, i s + s].")
    mock_data: bool = arg(False, "Train on random tokens, without files.")
    mmap_bin_files: bool = arg(True, "Read .bin files with pread instead of mapping them.", "--no-mmap-bin-files")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer."""

    tokenizer_type: str | None = arg(
        None,
        "GPT2BPETokenizer, BertWordPieceLowerCase, BertWordPieceCase, SentencePieceTokenizer, "
        "GPTSentencePieceTokenizer, Llama2Tokenizer, HFTokenizer, NullTokenizer.",
        metavar="NAME",
    )
    vocab_file: str | None = arg(None, "vocab.json of a GPT-2 style BPE, or vocab.txt of a WordPiece.", metavar="FILE")
    merge_file: str | None = arg(None, "merges.txt of a GPT-2 style BPE.", metavar="FILE")
    tokenizer_model: str | None = arg(
        None,
        "SentencePiece .model, or a tokenizer.json or the folder that holds it; never downloaded.",
        "--tokenizer-model",
        "--tokenizer-name-or-path",
        metavar="PATH",
    )
    vocab_size: int | None = arg(None, "Vocabulary of NullTokenizer, without its end-of-document token.", metavar="N")
    vocab_extra_ids: int = arg(0, "Adds <extra_id_0>, <extra_id_1> ... after the vocabulary.", metavar="N")
    make_vocab_size_divisible_by: int = arg(128, "Embedding rows are padded to a multiple of this times the TP size.")
    null_tokenizer_eod_id: int | None = arg(None, "End-of-document id of NullTokenizer; without it --vocab-size.")
