"""One tensor from the pieces that the ranks of a tensor-parallel group held, in our order of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Order = Literal["group", "part", "last"]
"""How rows of fused projections lie: [groups, heads/groups + 2, d] (checkpoint version 2 and later), on every rank
[3, heads, d] (version 0; Megatron-DeepSpeed since December 2024), or on every rank [heads, d, 3] (version 1.0)."""

_VOCABULARY = ("word_embeddings.weight", "output_layer.weight", "lm_head.bias")
_ROWS = (
    *_VOCABULARY,
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "cross_attention.linear_q.weight",
    "cross_attention.linear_q.bias",
    "cross_attention.linear_kv.weight",
    "cross_attention.linear_kv.bias",
)
_COLUMNS = ("linear_proj.weight", "mlp.linear_fc2.weight")


@dataclass(frozen=True, kw_only=True)
class Joiner:
    """How the pieces of one model lie.

    up_first: gated MLPs hold the up half before the gate (BigScience's --glu-activation).
    """

    heads: int
    groups: int
    head_size: int
    max_positions: int
    vocab_size: int
    qkv: Order
    kv: Order
    gated: bool
    up_first: bool

    def join(self, name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor, padding of the vocabulary cut off.

        Copies of what is not split, if they have drifted apart as BLOOM's norms did, are averaged.
        """
        if "linear_qkv." in name:
            return self._parts(pieces, self.qkv, self.groups, (self.heads // self.groups, 1, 1))
        if "linear_kv." in name:
            return self._parts(pieces, self.kv, self.heads, (1, 1))
        if "linear_fc1." in name and self.gated:
            gates, ups = zip(*(piece.chunk(2) for piece in pieces), strict=True)
            return torch.cat(ups + gates if self.up_first else gates + ups)
        dim = _split_dim(name, pieces[0], self.max_positions)
        if dim is None:
            return self._copy(pieces)
        whole = torch.cat(list(pieces), dim=dim)
        return whole[: self.vocab_size].clone() if name.endswith(_VOCABULARY) else whole

    def _parts(self, pieces: Sequence[torch.Tensor], order: Order, groups: int, sizes: tuple[int, ...]) -> torch.Tensor:
        """Rows of the first part of all groups, then those of the next."""
        inner, d = pieces[0].shape[1:], self.head_size
        if order == "group":
            whole = torch.cat(list(pieces)).view(groups, sum(sizes), d, *inner)
            return torch.cat([part.reshape(-1, *inner) for part in whole.split(sizes, dim=1)])
        n = len(sizes)
        if order == "part":
            views = [piece.reshape(n, -1, d, *inner) for piece in pieces]
        else:
            views = [piece.reshape(-1, d, n, *inner).movedim(2, 0) for piece in pieces]
        return torch.cat(views, dim=1).reshape(-1, *inner)

    @staticmethod
    def _copy(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        first = pieces[0]
        if all(torch.equal(first, piece) for piece in pieces[1:]):
            return first.clone()
        return torch.stack([piece.float() for piece in pieces]).mean(dim=0).to(first.dtype)


def joined_shape(name: str, pieces: Sequence[torch.Tensor], max_positions: int) -> tuple[int, ...]:
    """Shape of the whole with all of the vocabulary, without reading a value; () if the pieces do not match."""
    dim = _split_dim(name, pieces[0], max_positions)
    if len({piece.shape for piece in pieces}) != 1 or (dim is not None and dim >= pieces[0].dim()):
        return ()
    return tuple(size * len(pieces) if i == dim else size for i, size in enumerate(pieces[0].shape))


def _split_dim(name: str, piece: torch.Tensor, max_positions: int) -> int | None:
    if name.endswith(_COLUMNS):
        return 1
    if name.endswith("position_embeddings.weight"):  # sequence parallelism cuts it by positions
        return 0 if piece.shape[:1] != (max_positions,) else None
    return 0 if name.endswith(_ROWS) or "linear_qkv." in name else None
