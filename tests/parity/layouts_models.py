"""The layouts of BERT, of T5 and of GPT's kin: one per line of three tables."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tests.parity.layouts import axes_flags
from tests.parity.models import Mask
from tests.reference.bert import BertConfig
from tests.reference.gpt import Llama3Scaling, OracleConfig
from tests.reference.t5 import T5Config
from tests.reference.transformer import TransformerConfig

VOCABS = {"padded": 131, "exact": 128}


def words_of(x: tuple[str, ...]) -> str:
    """What is told of a line in a test's name."""
    return "-".join(word for word in x if word != "-")


class BertLayout(NamedTuple):
    """cp: by Ulysses' all-to-all. norms: before or after the residual, with tanh or erf GELU. head: binary or none."""

    tp: str
    sp: str
    cp: str
    pp: str
    schedule: str
    dp: str
    zero: str
    recompute: str
    norms: str
    head: str
    vocab: str
    mask: Mask

    @property
    def model(self) -> TransformerConfig:
        """A tiny one."""
        return BertConfig(
            num_layers=4,
            hidden=32,
            heads=8,
            kv_heads=8,
            ffn=64,
            vocab=VOCABS[self.vocab],
            max_positions=36,
            activation="gelu" if self.norms == "post" else "gelu_tanh",
            post_ln=self.norms == "post",
            binary_head=self.head == "binary",
        )

    @classmethod
    def parse(cls, line: str) -> BertLayout:
        """Read a line of the table."""
        return cls(*line.split())  # type: ignore[arg-type]

    def flags(self) -> list[str]:
        """What asks for it."""
        return axes_flags(self)

    def __str__(self) -> str:
        return "bert-" + words_of(self)


class T5Layout(NamedTuple):
    """split: the decoder's first stage, or the plan's choice. kind: Megatron's, published 1.0 and 1.1."""

    tp: str
    sp: str
    pp: str
    split: str
    schedule: str
    dp: str
    zero: str
    recompute: str
    kind: str
    layers: str
    lengths: str
    vocab: str
    mask: Mask

    @property
    def cp(self) -> str:
        """T5's sequences are not shared."""
        return "1"

    @property
    def model(self) -> TransformerConfig:
        """A tiny one; tied and unscaled with a bias, tied and scaled, or untied."""
        encoder_layers, decoder_layers = map(int, self.layers.split("+"))
        source, target = map(int, self.lengths.split("+"))
        megatron = T5Config(
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            hidden=32,
            heads=8,
            kv_heads=8,
            ffn=64,
            vocab=VOCABS[self.vocab],
            max_positions=36,
            lengths=(source, target),
        )
        published = replace(
            megatron,
            head_size=6,
            norm="rmsnorm",
            norm_eps=1e-6,
            bias=False,
            qkv_bias=False,
            softmax_scale=1.0,
            positions="relative",
            buckets=8,
            max_distance=20,
            head_bias=False,
        )
        kinds = {
            "megatron": megatron,
            "1.0": replace(published, activation="relu", scaled_output=True),
            "1.1": replace(published, activation="geglu", tied=False),
        }
        return kinds[self.kind]

    @classmethod
    def parse(cls, line: str) -> T5Layout:
        """Read a line of the table."""
        return cls(*line.split())  # type: ignore[arg-type]

    def flags(self) -> list[str]:
        """What asks for it."""
        split = [] if self.split == "-" else ["--pipeline-model-parallel-split-rank", self.split]
        return axes_flags(self) + split

    def __str__(self) -> str:
        return "t5-" + words_of(self)


class KinLayout(NamedTuple):
    """kind: what is special about the model, see KIN. mask packed: documents that do not see each other."""

    tp: str
    sp: str
    cp: str
    pp: str
    schedule: str
    dp: str
    zero: str
    recompute: str
    kind: str
    mask: Mask

    @property
    def vocab(self) -> str:
        """As in most lines of the other tables."""
        return "padded"

    @property
    def model(self) -> TransformerConfig:
        """A tiny one."""
        return KIN[self.kind]

    @classmethod
    def parse(cls, line: str) -> KinLayout:
        """Read a line of the table."""
        return cls(*line.split())  # type: ignore[arg-type]

    def flags(self) -> list[str]:
        """What asks for it."""
        packed = ["--reset-attention-mask", "--reset-position-ids"] if self.mask == "packed" else []
        return axes_flags(self) + packed

    def __str__(self) -> str:
        return "gpt-" + words_of(self)


GPT2 = OracleConfig(num_layers=4, hidden=32, heads=8, kv_heads=8, ffn=64, vocab=131, max_positions=36)
LLAMA = replace(
    GPT2,
    kv_heads=4,
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    qkv_bias=False,
    positions="rope",
    tied=False,
)
KIN = {
    "gpt2": GPT2,
    "neox": replace(
        GPT2, activation="gelu", positions="rope", rotary_percent=0.5, parallel_residual=True, tied=False, head_size=8
    ),
    "bloom": replace(GPT2, positions="alibi", embed_norm=True, heads=12, kv_heads=12, head_size=4),
    "mistral": replace(LLAMA, window=5, head_size=6),
    "qwen2": replace(LLAMA, qkv_bias=True, rope_interpolation=4.0),
    "qwen3": replace(LLAMA, qk_norm=True, tied=True, head_size=6),
    "llama3": replace(LLAMA, rotary_base=50.0, llama3=Llama3Scaling(4.0, 1.0, 4.0, 16), activation="reglu"),
    "nemotron": replace(LLAMA, norm="layernorm", norm_1p=True, activation="squared_relu", rotary_percent=0.5),
}

BERT_TABLE = """
tp  sp  cp    pp  schedule     dp  zero  recompute  norms  head    vocab   mask
1   -   1     1   1f1b         1   0     -          pre    binary  padded  uneven
1   -   1     1   gpipe        2   1     selective  post   binary  exact   uneven
1   -   1     1   1f1b         2   2     uniform    pre    words   padded  full
2   -   1     1   1f1b         1   0     -          post   binary  padded  uneven
2   sp  1     1   zbh1         1   1     selective  pre    binary  exact   uneven
4   sp  1     1   1f1b         1   0     block      post   binary  padded  full
4   -   1     1   gpipe        1   2     mlp        pre    binary  exact   uneven
1   -   a2a2  1   1f1b         1   0     -          post   binary  padded  uneven
1   -   a2a2  1   zbh1         2   2     block      pre    binary  exact   uneven
2   -   a2a2  1   1f1b         1   1     uniform    post   words   padded  uneven
1   -   1     2   1f1b         1   0     mlp        pre    binary  exact   uneven
1   -   1     2   zbh1         1   2     uniform    post   binary  padded  uneven
1   -   1     2   interleaved  2   1     -          post   words   exact   uneven
1   -   1     4   gpipe        1   1     block      pre    binary  padded  uneven
1   -   1     4   1f1b         1   0     selective  post   binary  padded  full
2   sp  1     2   zbh1         1   1     block      post   binary  padded  uneven
2   -   1     2   interleaved  1   2     spread     pre    binary  exact   uneven
2   -   a2a2  2   1f1b         1   2     host       post   binary  padded  uneven
"""

T5_TABLE = """
tp  sp  pp  split  schedule     dp  zero  recompute  kind      layers  lengths  vocab   mask
1   -   1   -      1f1b         1   0     -          megatron  2+2     32+16    padded  full
1   -   1   -      gpipe        2   2     selective  1.0       3+2     16+32    exact   uneven
1   -   1   -      1f1b         2   0     -          megatron  2+2     32+16    padded  uneven
1   -   1   -      1f1b         2   1     uniform    megatron  2+2     32+16    exact   uneven
1   -   1   -      1f1b         2   2     -          megatron  2+2     32+16    padded  uneven
2   -   1   -      1f1b         1   0     -          1.0       2+2     32+16    padded  uneven
2   sp  1   -      zbh1         1   1     selective  megatron  2+2     32+16    exact   uneven
4   sp  1   -      1f1b         1   0     uniform    1.1       1+2     32+16    padded  uneven
1   -   2   1      1f1b         1   0     -          megatron  2+2     32+16    padded  uneven
1   -   2   -      zbh1         1   2     uniform    1.0       3+1     32+16    padded  uneven
1   -   2   -      zbh1         2   0     -          1.1       2+2     16+32    exact   full
1   -   2   -      interleaved  2   1     -          1.0       2+4     16+32    exact   uneven
1   -   2   -      interleaved  1   0     block      megatron  2+3     32+16    padded  uneven
1   -   2   1      gpipe        2   1     mlp        1.0       2+3     32+32    padded  uneven
1   -   4   1      1f1b         1   2     host       1.0       1+3     32+16    exact   uneven
1   -   4   2      zbh1         1   1     block      megatron  2+4     32+16    padded  uneven
1   -   4   3      gpipe        1   0     selective  1.1       5+1     16+32    padded  uneven
1   -   4   -      interleaved  1   1     -          1.1       4+4     32+16    padded  uneven
2   sp  2   -      zbh1         1   2     uniform    1.0       2+2     32+16    padded  uneven
2   -   2   1      1f1b         1   1     spread     1.1       2+2     32+16    padded  uneven
2   -   2   -      interleaved  2   2     selective  megatron  2+2     32+16    padded  uneven
2   sp  4   2      1f1b         1   1     block      1.0       2+2     32+16    exact   uneven
"""

KIN_TABLE = """
tp  sp  cp    pp  schedule     dp  zero  recompute  kind      mask
2   -   1     1   1f1b         1   0     -          neox      uneven
2   sp  1     2   zbh1         1   1     block      neox      packed
1   -   a2a2  1   1f1b         1   0     -          bloom     packed
2   -   a2a2  1   gpipe        1   2     uniform    bloom     uneven
2   sp  1     1   zbh1         1   0     selective  qwen3     packed
1   -   a2a2  2   1f1b         1   2     -          qwen3     uneven
1   -   a2a2  1   1f1b         1   1     selective  mistral   packed
2   -   1     2   interleaved  1   2     spread     mistral   uneven
2   sp  1     1   1f1b         1   0     mlp        nemotron  uneven
1   -   1     2   1f1b         1   0     -          llama3    packed
1   -   ring2 1   1f1b         1   0     -          qwen2     uneven
1   -   a2a2  2   zbh1         1   1     uniform    gpt2      packed
"""


def lines(table: str) -> list[str]:
    """Of a table without its head."""
    return table.strip().splitlines()[1:]


LAYOUTS = [
    *(BertLayout.parse(line) for line in lines(BERT_TABLE)),
    *(T5Layout.parse(line) for line in lines(T5_TABLE)),
    *(KinLayout.parse(line) for line in lines(KIN_TABLE)),
]
