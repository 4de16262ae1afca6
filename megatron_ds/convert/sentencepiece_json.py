"""A SentencePiece model as a tokenizer.json, so that readers of Hugging Face's files give the ids that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4


def as_tokenizer_json(path: Path, added: Sequence[str], *, begins_with_bos: bool) -> str | None:
    """The text of tokenizer.json, None for a model that it cannot express; `added`: names of ids behind its own."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors

    formats: Any = sentencepiece_model_pb2
    proto = formats.ModelProto.FromString(path.read_bytes())
    kind, symbols = proto.trainer_spec.model_type, any(piece.type == _USER_DEFINED for piece in proto.pieces)
    if kind != _UNIGRAM and (kind != _BPE or symbols):  # unigram finds its users' symbols by their score
        return None
    library: Any = Tokenizer(_model(proto))
    library.normalizer = _normalizer(proto.normalizer_spec)
    # Pieces of several blanks lie across the words' bounds.
    if proto.trainer_spec.split_by_whitespace and not proto.trainer_spec.allow_whitespace_only_pieces:
        library.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never")
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    library.decoder = decoders.Sequence(parts)
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    library.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (*control, *added)])
    if begins_with_bos:
        bos = proto.trainer_spec.bos_piece
        library.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, library.token_to_id(bos))]
        )
    text: str = library.to_str(pretty=True)
    return text


def _model(proto: Any) -> Any:
    from tokenizers import models

    fallback, pieces = proto.trainer_spec.byte_fallback, [(piece.piece, piece.score) for piece in proto.pieces]
    if proto.trainer_spec.model_type == _UNIGRAM:
        return models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)
    vocab = {piece: token for token, (piece, _) in enumerate(pieces)}
    # A merge is any way to cut a piece in two; the piece with the best score is made first.
    merges = [
        (-score, vocab[piece], piece[:cut], piece[cut:])
        for piece, score in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    ordered = [(left, right) for _, _, left, right in sorted(merges)]
    unknown = proto.trainer_spec.unk_piece
    return models.BPE(vocab, ordered, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    parts: list[Any] = []
    if spec.precompiled_charsmap:
        parts.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        parts += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        parts.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*parts, normalizers.Replace(" ", _SPACE)])
