"""The layouts of the parity suite, one per line of a table, and what of a layout is possible at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from tests.parity.models import SAMPLES, Mask
from tests.reference.gpt import OracleConfig


class Layout(NamedTuple):
    """One line of the table.

    cp: context parallelism by a ring or by Ulysses' all-to-all, and its size. interleaved: two virtual stages.
    model: learned positions come with LayerNorm, GELU and biases; rope with RMSNorm, SwiGLU and no biases.
    """

    tp: str
    sp: str
    cp: str
    pp: str
    schedule: str
    dp: str
    zero: str
    recompute: str
    tied: str
    positions: str
    heads: str
    vocab: str
    mask: Mask
    stages: str
    overlap: str

    @property
    def model(self) -> OracleConfig:
        """A tiny model; two virtual stages on four ranks need eight layers, 1 + 3 x 2 are uneven."""
        layers = 4
        if self.pp == "4":
            layers = 8 if self.schedule == "interleaved" else 7 if self.stages == "uneven" else 4
        vocab = 131 if self.vocab == "padded" else 128
        kv_heads, tied = 8 if self.heads == "mha" else 4, self.tied == "tied"
        gpt2 = OracleConfig(
            num_layers=layers, hidden=32, heads=8, kv_heads=kv_heads, ffn=64, vocab=vocab, max_positions=36, tied=tied
        )
        if self.positions == "learned":
            return gpt2
        return OracleConfig(
            **gpt2.__dict__
            | {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "qkv_bias": False, "positions": "rope"}
        )

    @classmethod
    def parse(cls, line: str) -> Layout:
        """Read a line of the table."""
        return cls(*line.split())  # type: ignore[arg-type]

    def flags(self) -> list[str]:
        """What asks for this layout on the command line."""
        return axes_flags(self) + f"{STAGES[self.stages]} {OVERLAP[self.overlap]}".split()

    def __str__(self) -> str:
        words = [f"tp{self.tp}", self.sp, self.cp, f"pp{self.pp}", self.schedule, f"dp{self.dp}", f"zero{self.zero}"]
        return "-".join(word for word in (*words, *self[7:]) if word != "-")


class Axes(Protocol):
    """What every table says of a layout."""

    @property
    def tp(self) -> str: ...
    @property
    def sp(self) -> str: ...
    @property
    def cp(self) -> str: ...
    @property
    def pp(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def dp(self) -> str: ...
    @property
    def zero(self) -> str: ...
    @property
    def recompute(self) -> str: ...
    @property
    def vocab(self) -> str: ...


def cp_size(x: Axes) -> int:
    """Ranks that share a sequence."""
    return int(x.cp[-1])


def world_size(x: Axes) -> int:
    """Ranks in all."""
    return int(x.tp) * cp_size(x) * int(x.pp) * int(x.dp)


def axes_flags(x: Axes) -> list[str]:
    """What asks for the axes on the command line."""
    interleaved = x.schedule == "interleaved"
    # Interleaving goes through the micro-batches in groups of pp.
    micro = 1 if interleaved and SAMPLES // 2 // int(x.dp) < int(x.pp) else 2
    words = f"""--tensor-model-parallel-size {x.tp} --pipeline-model-parallel-size {x.pp}
        --pipeline-schedule {x.schedule} --zero-stage {x.zero} --micro-batch-size {micro}
        --make-vocab-size-divisible-by {32 if x.vocab == "exact" else 64} --reduce-bucket-size 5000
        {"--sequence-parallel" if x.sp == "sp" else ""} {CP[x.cp[:-1]].format(cp_size(x))}
        {"--num-virtual-stages-per-pipeline-rank 2" if interleaved else ""} {RECOMPUTE[x.recompute]}"""
    return words.split()


CP = {"": "", "ring": "--context-parallel-size {}", "a2a": "--ds-sequence-parallel-size {}"}
FULL = "--recompute-granularity full --recompute-method"
RECOMPUTE = {
    "-": "",
    "selective": "--recompute-granularity selective",
    "mlp": "--recompute-granularity selective --recompute-modules core_attn mlp",
    "uniform": f"{FULL} uniform --recompute-num-layers 2",
    "block": f"{FULL} block --recompute-num-layers 1",
    "host": f"{FULL} uniform --recompute-num-layers 1 --checkpoint-in-cpu",
    "spread": f"{FULL} uniform --recompute-num-layers 1 --distribute-saved-activations",
}
STAGES = {"-": "", "uneven": "--decoder-first-pipeline-num-layers 1"}
OVERLAP = {"overlap": "", "late": "--no-overlap-grad-reduce", "gather": "--overlap-param-gather"}

OPTIONS: dict[str, tuple[str, ...]] = {
    "tp": ("1", "2", "4"),
    "sp": ("-", "sp"),
    "cp": ("1", "ring2", "ring4", "a2a2", "a2a4"),
    "pp": ("1", "2", "4"),
    "schedule": ("1f1b", "gpipe", "interleaved", "zbh1"),
    "dp": ("1", "2"),
    "zero": ("0", "1", "2"),
    "recompute": ("-", "selective", "mlp", "uniform", "block", "host", "spread"),
    "tied": ("tied", "untied"),
    "positions": ("learned", "rope"),
    "heads": ("mha", "gqa"),
    "vocab": ("padded", "exact"),
    "mask": ("full", "holes", "uneven"),
    "stages": ("-", "uneven"),
    "overlap": ("overlap", "late", "gather"),
}


def is_possible(x: Layout) -> bool:
    """True for a layout that the package accepts, on eight ranks at most."""
    return (
        world_size(x) <= 8
        and (x.sp == "-" or x.tp != "1")
        and (x.schedule != "interleaved" or x.pp != "1")
        and (x.recompute != "spread" or (x.tp != "1" and x.sp == "-"))
        and (x.stages == "-" or (x.pp != "1" and x.schedule != "interleaved"))
        and (x.overlap != "gather" or x.zero != "0")
        and not (x.cp.startswith("a2a") and x.sp == "sp")
        and not (x.cp.startswith("a2a") and x.heads == "gqa" and int(x.tp) * cp_size(x) > 4)
    )


TABLE = """
tp  sp  cp     pp  schedule     dp  zero  recompute  tied    positions  heads  vocab   mask    stages  overlap
1   -   1      1   1f1b         1   0     -          untied  learned    gqa    padded  full    -       overlap
1   -   1      1   1f1b         1   0     block      tied    rope       gqa    exact   holes   -       late
1   -   1      1   1f1b         1   0     host       untied  rope       mha    exact   holes   -       late
1   -   1      1   gpipe        1   0     uniform    tied    learned    gqa    padded  uneven  -       overlap
1   -   1      1   zbh1         1   1     selective  tied    learned    gqa    exact   uneven  -       overlap
1   -   1      1   zbh1         1   2     mlp        tied    learned    gqa    exact   holes   -       gather
1   -   1      1   1f1b         2   0     host       tied    learned    mha    exact   holes   -       overlap
1   -   1      1   1f1b         2   1     -          tied    rope       gqa    padded  uneven  -       gather
1   -   1      1   gpipe        2   2     selective  untied  rope       gqa    exact   full    -       late
1   -   1      2   1f1b         1   1     mlp        tied    learned    mha    exact   uneven  uneven  late
1   -   1      2   gpipe        1   2     host       untied  rope       gqa    exact   full    uneven  gather
1   -   1      2   interleaved  1   0     uniform    tied    learned    gqa    padded  holes   -       overlap
1   -   1      2   zbh1         1   0     selective  untied  learned    mha    padded  full    uneven  overlap
1   -   a2a2   1   gpipe        1   0     block      tied    rope       gqa    padded  full    -       overlap
1   -   a2a2   1   zbh1         1   1     selective  untied  learned    mha    exact   uneven  -       gather
1   -   ring2  1   1f1b         1   2     host       tied    learned    mha    padded  uneven  -       late
1   -   ring2  1   zbh1         1   2     block      tied    rope       mha    exact   holes   -       overlap
2   -   1      1   1f1b         1   0     spread     untied  rope       mha    exact   full    -       late
2   -   1      1   1f1b         1   1     selective  tied    learned    gqa    padded  holes   -       gather
2   sp  1      1   1f1b         1   0     mlp        untied  rope       gqa    padded  uneven  -       overlap
1   -   1      4   1f1b         1   1     block      untied  learned    mha    exact   uneven  uneven  gather
1   -   1      4   gpipe        1   0     selective  tied    rope       gqa    padded  uneven  -       late
1   -   1      4   interleaved  1   2     mlp        untied  rope       mha    exact   full    -       overlap
1   -   1      4   zbh1         1   2     uniform    tied    rope       gqa    exact   holes   uneven  late
1   -   a2a4   1   1f1b         1   2     -          untied  rope       gqa    padded  holes   -       late
1   -   a2a4   1   gpipe        1   0     mlp        tied    learned    gqa    exact   holes   -       late
1   -   a2a4   1   zbh1         1   1     selective  tied    rope       gqa    exact   full    -       overlap
1   -   a2a4   1   zbh1         1   1     uniform    tied    rope       gqa    exact   holes   -       overlap
1   -   ring2  2   gpipe        1   1     mlp        tied    learned    mha    exact   holes   uneven  overlap
1   -   ring4  1   1f1b         1   1     mlp        untied  learned    mha    exact   full    -       late
1   -   ring4  1   1f1b         1   1     uniform    untied  rope       mha    exact   full    -       gather
1   -   ring4  1   zbh1         1   2     host       untied  rope       mha    exact   holes   -       gather
2   -   a2a2   1   1f1b         1   2     uniform    tied    rope       mha    exact   full    -       gather
4   -   1      1   1f1b         1   2     block      untied  rope       mha    exact   full    -       late
4   -   1      1   zbh1         1   2     mlp        untied  rope       mha    exact   uneven  -       late
4   sp  1      1   gpipe        1   0     -          tied    learned    mha    exact   holes   -       overlap
1   -   1      4   1f1b         2   1     uniform    untied  learned    gqa    padded  uneven  uneven  overlap
1   -   a2a2   2   interleaved  2   1     mlp        tied    rope       gqa    padded  uneven  -       late
1   -   a2a2   4   1f1b         1   2     -          tied    learned    mha    exact   holes   -       gather
1   -   a2a4   1   zbh1         2   0     block      tied    learned    gqa    exact   full    -       late
1   -   a2a4   2   gpipe        1   1     block      tied    learned    mha    exact   uneven  uneven  overlap
1   -   a2a4   2   interleaved  1   1     host       untied  rope       mha    exact   full    -       gather
1   -   ring2  4   gpipe        1   0     selective  tied    learned    gqa    padded  holes   uneven  late
1   -   ring4  1   1f1b         2   1     host       untied  rope       gqa    padded  holes   -       late
1   -   ring4  2   interleaved  1   2     selective  tied    rope       mha    exact   full    -       overlap
1   -   ring4  2   zbh1         1   0     -          tied    learned    mha    padded  uneven  uneven  overlap
2   -   1      4   interleaved  1   1     spread     tied    rope       gqa    padded  holes   -       late
2   -   a2a2   2   zbh1         1   1     spread     untied  learned    mha    exact   uneven  uneven  gather
2   -   a2a4   1   1f1b         1   1     spread     tied    rope       mha    padded  holes   -       late
2   -   ring2  1   gpipe        2   0     spread     tied    learned    gqa    padded  uneven  -       overlap
2   -   ring4  1   zbh1         1   0     spread     tied    rope       gqa    padded  full    -       late
2   sp  1      4   zbh1         1   0     host       tied    learned    mha    exact   uneven  uneven  late
2   sp  ring2  2   interleaved  1   2     -          untied  rope       mha    exact   holes   -       gather
2   sp  ring4  1   gpipe        1   2     block      untied  learned    gqa    padded  holes   -       late
4   -   1      2   gpipe        1   2     spread     tied    rope       mha    exact   holes   uneven  gather
4   -   a2a2   1   1f1b         1   1     host       tied    learned    mha    exact   holes   -       late
4   sp  1      1   gpipe        2   2     selective  tied    learned    gqa    exact   uneven  -       late
4   sp  1      2   interleaved  1   0     block      tied    learned    mha    padded  holes   -       overlap
4   sp  ring2  1   zbh1         1   1     uniform    tied    rope       gqa    padded  full    -       gather
"""
LAYOUTS = [Layout.parse(line) for line in TABLE.strip().splitlines()[1:]]
"""Each axis alone with each of its options, and as many more as let every two options meet that can."""


def pairs(x: Layout) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Every two options of a layout."""
    return itertools.combinations(zip(x._fields, x, strict=True), 2)
