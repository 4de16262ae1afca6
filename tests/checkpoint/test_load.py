"""Loading: any layout from any other bit for bit, which checkpoint is found, and what is said when it does not fit."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_ds.checkpoint import shard
from megatron_ds.checkpoint.layout import Index, Stored, StoredTensor
from megatron_ds.checkpoint.load import _plan, find, holds_checkpoints, load, names, read_index
from megatron_ds.checkpoint.save import save
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Box, Init, ParamSpec, Piece, Split
from tests.checkpoint.fake_world import random_tensor, same_bits, save_all, whole_piece

SOLO = Axis.solo("world")
DTYPES = [torch.float32, torch.bfloat16, torch.int64]


@dataclass(frozen=True)
class Param:
    """A parameter, its global values, and what each rank holds of it by the definition of a fused, padded split."""

    spec: ParamSpec
    values: torch.Tensor

    def local(self, rank: int, size: int) -> torch.Tensor:
        split = self.spec.split
        if split is None:
            return self.values.clone()
        values = self.values
        if split.padded_to:
            shape = list(values.shape)
            shape[split.dim] = split.padded_to - shape[split.dim]
            values = torch.cat([values, torch.zeros(shape, dtype=values.dtype)], split.dim)
        parts = values.split(list(split.parts), split.dim) if split.parts else (values,)
        return torch.cat([part.chunk(size, split.dim)[rank] for part in parts], split.dim)


def random_param(rng: random.Random, number: int) -> Param:
    dtype, dims = rng.choice(DTYPES), rng.randint(1, 3)
    shape = [rng.randint(1, 7) for _ in range(dims)]
    dim = rng.randrange(dims)
    kind = rng.choice(["whole", "split", "fused", "padded"])
    if kind == "whole":
        split = None
    elif kind == "padded":
        shape[dim] = rng.randint(1, 12)
        split = Split(dim, padded_to=12)
    else:
        parts = tuple(4 * rng.randint(1, 2) for _ in range(3)) if kind == "fused" else ()
        shape[dim] = sum(parts) or 4 * rng.randint(1, 3)
        split = Split(dim, parts)
    spec = ParamSpec(f"p{number}", tuple(shape), Init("zeros"), split)
    return Param(spec, random_tensor(shape, dtype, number))


def laid_out(
    params: list[Param], rng: random.Random, fill: bool
) -> tuple[list[list[Piece]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Pieces of every rank of a random layout, and (tensor, what it must hold); without `fill` the tensors hold zeros.

    Each tensor-parallel rank's share of a parameter is whole, or flattened and cut at random places over several ranks.
    """
    tp, dp = rng.choice([1, 2, 4]), rng.randint(1, 3)
    by_rank: list[list[Piece]] = [[] for _ in range(tp * dp)]
    pairs = []
    for param in params:
        for tp_rank in range(tp if param.spec.split else 1):
            truth = param.local(tp_rank, tp)
            tensor = truth.clone() if fill else torch.zeros_like(truth)
            if rng.random() < 0.4:
                by_rank[tp_rank].extend(param.spec.pieces(tensor, tp_rank, tp))
            else:
                flat = tensor.view(-1)
                cuts = sorted(rng.randint(0, flat.numel()) for _ in range(dp - 1))
                for dp_rank, (a, b) in enumerate(zip([0, *cuts], [*cuts, flat.numel()], strict=True)):
                    by_rank[dp_rank * tp + tp_rank].extend(param.spec.flat_pieces(flat[a:b], a, tp_rank, tp))
            pairs.append((tensor, truth))
    return by_rank, pairs


@pytest.mark.parametrize("seed", range(40))
def test_any_layout_loads_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(shard, "_BLOCK_BYTES", rng.choice([8, 50, 1 << 20]))
    params = [random_param(rng, seed * 100 + number) for number in range(12)]
    by_rank, _ = laid_out(params, rng, fill=True)
    assert save_all(monkeypatch, tmp_path, seed, by_rank) == [None] * len(by_rank)
    index = find(tmp_path).index
    assert names(index) == sorted(param.spec.name for param in params)
    for _ in range(5):
        by_rank, pairs = laid_out(params, rng, fill=False)
        for pieces in by_rank:
            load(index, pieces)
        for tensor, truth in pairs:
            assert same_bits(tensor, truth)


def test_tp2_and_zero_shards_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks hold columns of w and uneven flat halves of its moment; one rank reads both whole."""
    w, moment = torch.arange(12.0).view(3, 4), torch.arange(100.0, 112.0).view(3, 4)
    flat = moment.reshape(-1)
    by_rank = [
        [
            Piece("model/w", (3, 4), Box((0, 0), (3, 2)), w[:, :2]),
            Piece("optimizer/w/exp_avg", (3, 4), Box((0, 0), (1, 4)), flat[:4].view(1, 4)),
            Piece("optimizer/w/exp_avg", (3, 4), Box((1, 0), (1, 1)), flat[4:5].view(1, 1)),
        ],
        [
            Piece("model/w", (3, 4), Box((0, 2), (3, 2)), w[:, 2:]),
            Piece("optimizer/w/exp_avg", (3, 4), Box((1, 1), (1, 3)), flat[5:8].view(1, 3)),
            Piece("optimizer/w/exp_avg", (3, 4), Box((2, 0), (1, 4)), flat[8:].view(1, 4)),
        ],
    ]
    assert save_all(monkeypatch, tmp_path, 1, by_rank) == [None, None]
    one, two = torch.zeros(3, 4), torch.zeros(3, 4)
    load(find(tmp_path).index, [whole_piece("model/w", one), whole_piece("optimizer/w/exp_avg", two)])
    assert torch.equal(one, w)
    assert torch.equal(two, moment)


def test_views_parameters_and_scalars_are_filled_in_place(tmp_path: Path) -> None:
    grid, step = torch.arange(6.0).view(2, 3), torch.tensor(7)
    save(tmp_path, 1, [whole_piece("w", grid), whole_piece("step", step)], {}, SOLO)
    storage, parameter, scalar = torch.full((4, 5), -1.0), torch.nn.Parameter(torch.zeros(2, 3)), torch.tensor(0)
    wanted = [whole_piece("w", storage[1:3, 1:4]), whole_piece("w", parameter), whole_piece("step", scalar)]
    load(find(tmp_path).index, wanted)
    assert torch.equal(storage[1:3, 1:4], grid)
    assert storage.sum() == grid.sum() - 14, "only the view was written"
    assert torch.equal(parameter.detach(), grid)
    assert parameter.requires_grad
    assert scalar == 7


def test_floats_convert_and_integers_do_not(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1.0 + 2**-8, -3.3])
    save(tmp_path, 1, [whole_piece("w", values), whole_piece("n", torch.tensor([1]))], {}, SOLO)
    index, half, whole = find(tmp_path).index, torch.zeros(3, dtype=torch.bfloat16), torch.zeros(1)
    load(index, [whole_piece("w", half)])
    assert half.tolist() == [1.0, 1.0, -3.296875]
    with pytest.raises(CheckpointError, match="I64"):
        load(index, [whole_piece("n", whole)])


def test_everything_that_does_not_fit_is_in_one_table_and_nothing_is_loaded(tmp_path: Path) -> None:
    stored = {"a": (2, 3), "b": (4,), "c": (5,), "old": (1,)}
    save(tmp_path, 1, [whole_piece(name, torch.ones(shape)) for name, shape in stored.items()], {}, SOLO)
    wanted = {"a": (2, 3), "b": (6,), "c": (5, 1), "new": (1,)}
    pieces = [whole_piece(name, torch.zeros(shape)) for name, shape in wanted.items()]
    with pytest.raises(CheckpointError) as caught:
        load(find(tmp_path).index, pieces)
    lines = [line.split() for line in caught.value.found.splitlines()]
    assert ["b", "[6]", "[4]"] in lines
    assert ["c", "[5,", "1]", "[5]"] in lines
    assert ["new", "[1]", "missing"] in lines
    assert not any(line[0] == "a" for line in lines)
    assert "old" in lines[-1]
    assert not any(piece.tensor.any() for piece in pieces)


def test_a_rank_reads_only_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 30 to 39 of 100, then flat elements: the bytes read beside the header are the bytes wanted."""
    w = torch.arange(1000.0).view(100, 10)
    save(tmp_path, 1, [whole_piece("w", w)], {}, SOLO)
    index, read, real = find(tmp_path).index, [], shard._fill
    header = int.from_bytes((index.path / "rank_00000.safetensors").read_bytes()[:8], "little") + 8

    def counting(file: object, into: memoryview) -> None:
        read.append(len(into))
        real(file, into)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "_fill", counting)
    rows = torch.zeros(10, 10)
    load(index, [Piece("w", (100, 10), Box((30, 0), (10, 10)), rows)])
    assert torch.equal(rows, w[30:40])
    assert sum(read) == header + 400
    read.clear()
    some = torch.zeros(1, 3)
    load(index, [Piece("w", (100, 10), Box((99, 7), (1, 3)), some)])
    assert some.tolist() == [[997.0, 998.0, 999.0]]
    assert sum(read) == header + 12


def test_a_disk_that_fails_while_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, [whole_piece("w", torch.ones(4))], {}, SOLO)

    def failing(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megatron_ds.checkpoint.load.read_box", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        load(find(tmp_path).index, [whole_piece("w", torch.zeros(4))])


def test_lookup_is_linear_in_boxes(tmp_path: Path) -> None:
    """1000 tensors in 100 boxes each: planning one rank's share takes seconds at most."""
    tensors = {
        f"t{i}": StoredTensor((50, 8), "F32", tuple(Stored(Box((r, 0), (1, 8)), f"r{r}", f"t{i}#0") for r in range(50)))
        for i in range(1000)
    }
    index = Index(tmp_path, 1, {}, {}, tensors)
    target = torch.zeros(1, 8)
    begin = time.monotonic()
    reads = _plan(index, [Piece(name, (50, 8), Box((17, 0), (1, 8)), target) for name in tensors])
    assert time.monotonic() - begin < 10
    assert list(reads) == ["r17"]
    assert len(reads["r17"]) == 1000


# Which checkpoint is found.


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for iteration in (10, 20, 30):
        save(tmp_path, iteration, [whole_piece("w", torch.full((4,), float(iteration)))], {}, SOLO)
    return tmp_path


def tracker(directory: Path) -> Path:
    return directory / "latest_checkpointed_iteration.txt"


def test_find_follows_the_tracker(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(three).iteration == 30
    tracker(three).write_text("20\n")
    assert (find(str(three)).iteration, find(three).path) == (20, three / "iter_0000020")
    assert find(three, 10).iteration == 10
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"garbage", b"40", b"-20", b"20 30", b"\xff", b"release", b"2" * 5000, None])
def test_find_without_a_usable_tracker_takes_the_newest_and_says_so(
    three: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    tracker(three).unlink() if content is None else tracker(three).write_bytes(content)
    assert find(three).iteration == 30
    assert "WARNING" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["no index", "no shard", "short shard"])
def test_find_passes_over_an_incomplete_one_and_says_so(
    three: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    latest = three / "iter_0000030"
    if damage == "short shard":
        (latest / "rank_00000.safetensors").write_bytes(b"")
    else:
        (latest / ("index.json" if damage == "no index" else "rank_00000.safetensors")).unlink()
    assert find(three).iteration == 20
    warning = capsys.readouterr().err
    assert "WARNING" in warning
    assert "iter_0000030" in warning
    with pytest.raises(CheckpointError, match="iter_0000030"):
        find(three, 30)


def test_find_ignores_staging_and_strangers(three: Path) -> None:
    for name in ("iter_0000040.tmp", "iter_50", "iter_00000x0", "global_step60"):
        (three / "iter_0000030").rename(three / "moved")
        (three / name).mkdir()
        (three / "moved").rename(three / "iter_0000030")
    (three / "iter_0000070").write_text("a file")
    assert find(three).iteration == 30
    tracker(three).unlink()
    assert find(three).iteration == 30


def test_find_uses_what_was_set_aside_only_if_nothing_took_its_place(three: Path) -> None:
    (three / "iter_0000030").rename(three / "iter_0000030.old")
    assert find(three).path == three / "iter_0000030.old"
    save(three, 30, [whole_piece("w", torch.full((4,), 31.0))], {}, SOLO)
    (three / "iter_0000020").rename(three / "iter_0000030.old")
    assert find(three).path == three / "iter_0000030"


def test_find_an_iteration_that_is_not_there(three: Path) -> None:
    with pytest.raises(CheckpointError, match="10, 20, 30") as caught:
        find(three, 25)
    assert caught.value.subject == "--ckpt-step 25"


def test_find_in_an_empty_or_missing_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, found in (("empty", "no checkpoint"), ("missing", "no such directory")):
        assert not holds_checkpoints(tmp_path / name)
        with pytest.raises(CheckpointError, match=found) as caught:
            find(tmp_path / name)
        assert caught.value.exit_code == 4
        assert not (tmp_path / "missing").exists()


def test_find_where_all_are_damaged_is_an_error_not_a_fresh_start(three: Path) -> None:
    for iteration in (10, 20, 30):
        (three / f"iter_00000{iteration}" / "index.json").unlink()
    assert holds_checkpoints(three)
    with pytest.raises(CheckpointError, match="iter_0000010"):
        find(three)


def test_read_index_gives_the_state(three: Path) -> None:
    save(three, 40, [whole_piece("w", torch.zeros(4))], {"a": {"b": [1, None]}}, SOLO)
    assert read_index(three / "iter_0000040").state == {"a": {"b": [1, None]}}
