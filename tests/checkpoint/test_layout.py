"""Names, the exact-cover check, and an index that lies: every lie is one CheckpointError and changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ds.checkpoint import layout
from megatron_ds.checkpoint.load import find, load, read_index
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.spec import Box
from tests.checkpoint.fake_world import whole_piece


def test_covers_exactly_agrees_with_counting_elements() -> None:
    rng = random.Random(0)
    verdicts = set()
    for _ in range(3000):
        shape = tuple(rng.randint(1, 3) for _ in range(rng.randint(0, 3)))
        boxes = []
        for _ in range(rng.randint(0, 4)):
            start = tuple(rng.randint(0, n - 1) for n in shape)
            boxes.append(Box(start, tuple(rng.randint(1, n - s) for n, s in zip(shape, start, strict=True))))
        counts = dict.fromkeys(itertools.product(*(range(n) for n in shape)), 0)
        for box in boxes:
            for element in itertools.product(*(range(s, s + n) for s, n in zip(box.start, box.shape, strict=True))):
                counts[element] += 1
        expected = all(count == 1 for count in counts.values())
        assert layout.covers_exactly(shape, boxes) == expected, (shape, boxes)
        verdicts.add(expected)
    assert verdicts == {True, False}


def test_covers_exactly_sees_boxes_outside() -> None:
    assert not layout.covers_exactly((2,), [Box((0,), (3,))])
    assert not layout.covers_exactly((2,), [Box((0,), (2,)), Box((5,), (1,))])


def test_a_pinwheel_covers_exactly() -> None:
    arms = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1))]
    assert layout.covers_exactly((3, 3), [*arms, Box((1, 1), (1, 1))])
    assert not layout.covers_exactly((3, 3), arms)


def test_names_are_megatrons() -> None:
    assert layout.final_path(Path("d"), 100) == Path("d/iter_0000100")
    assert layout.final_path(Path("d"), 12345678) == Path("d/iter_12345678")
    assert layout.TRACKER == "latest_checkpointed_iteration.txt"
    assert layout.shard_name(3) == "rank_00003.safetensors"


# An index written here by hand, not by our save().


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint of `w` [4, 2] in two boxes and two files."""
    path = tmp_path / "ckpt" / "iter_0000007"
    path.mkdir(parents=True)
    values = torch.arange(8.0).view(4, 2)
    save_file({"w#0": values[:3].contiguous()}, path / "a.safetensors")
    save_file({"w#0": values[3:].contiguous()}, path / "b.safetensors")
    (path.parent / "latest_checkpointed_iteration.txt").write_text("7")
    (path / "index.json").write_text(json.dumps(hand_written(path)))
    return path


def hand_written(path: Path) -> dict[str, Any]:
    return {
        "format": "megatron_ds.checkpoint",
        "version": 1,
        "iteration": 7,
        "state": {"consumed_samples": 70},
        "files": {name: {"bytes": (path / name).stat().st_size} for name in ("a.safetensors", "b.safetensors")},
        "tensors": {
            "w": {
                "shape": [4, 2],
                "dtype": "F32",
                "boxes": [
                    {"file": "a.safetensors", "key": "w#0", "start": [0, 0], "shape": [3, 2]},
                    {"file": "b.safetensors", "key": "w#0", "start": [3, 0], "shape": [1, 2]},
                ],
            }
        },
    }


def snapshot(root: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def reject(path: Path, subject: str = "") -> CheckpointError:
    """Opening and loading ends in one CheckpointError, writes nothing to the disk and nothing to the tensor."""
    before, target = snapshot(path.parent.parent), torch.full((4, 2), -1.0)
    with pytest.raises(CheckpointError) as caught:
        load(read_index(path), [whole_piece("w", target)])
    assert subject in caught.value.subject
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.fix
    assert snapshot(path.parent.parent) == before
    assert torch.equal(target, torch.full((4, 2), -1.0))
    return caught.value


def test_hand_written_checkpoint_loads(good: Path) -> None:
    found, target = find(good.parent), torch.zeros(4, 2)
    load(found.index, [whole_piece("w", target)])
    assert (found.path, found.iteration) == (good, 7)
    assert found.index.state == {"consumed_samples": 70}
    assert torch.equal(target, torch.arange(8.0).view(4, 2))


def _box(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"]["w"]["boxes"][0].update(changes)


def _tensor(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"]["w"].update(changes)


def _one_of_sixty_dims(index: dict[str, Any]) -> None:
    _tensor(shape=[4, 2] + [1] * 58)(index)
    for box in index["tensors"]["w"]["boxes"]:
        box["start"] += [0] * 58
        box["shape"] += [1] * 58


def _top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index.update(changes)


def _file(name: Any, size: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["files"].update({name: {"bytes": size}})


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "path upwards": _file("../x", 8),
    "absolute path": _file("/etc/hostname", 8),
    "dot dot": _file("..", 8),
    "empty name": _file("", 8),
    "name of a directory": _file("sub/x", 8),
    "NUL in a name": _file("a\0b", 8),
    "file that is not there": _file("c.safetensors", 8),
    "wrong size": _file("a.safetensors", 9),
    "size of another kind": _file("a.safetensors", "many"),
    "size true": _file("a.safetensors", True),
    "negative size": _file("a.safetensors", -1),
    "unlisted file": _box(file="c.safetensors"),
    "box past the end": _box(start=[2, 0]),
    "box before the start": _box(start=[-1, 0]),
    "empty box": _box(shape=[0, 2]),
    "huge box": _box(shape=[2**62, 2]),
    "box of fewer dims": _box(start=[0], shape=[3]),
    "box of floats": _box(start=[0.0, 0.0]),
    "overlap": _box(shape=[4, 2]),
    "hole": _box(start=[0, 0], shape=[2, 2]),
    "key used twice": lambda index: index["tensors"].update(v=json.loads(json.dumps(index["tensors"]["w"]))),
    "key that is not in the file": _box(key="w#1"),
    "metadata as a key": _box(key="__metadata__"),
    "key of another kind": _box(key=3),
    "no boxes": _tensor(boxes=[]),
    "boxes of another kind": _tensor(boxes={"a": 1}),
    "unknown dtype": _tensor(dtype="F128"),
    "torch's name of a dtype": _tensor(dtype="torch.float32"),
    "dtype of the same size": _tensor(dtype="I32"),
    "larger dtype": _tensor(dtype="F64"),
    "other shape": _tensor(shape=[2, 4]),
    "huge shape": _tensor(shape=[2**40, 2**40]),
    "empty shape": _tensor(shape=[0, 2]),
    "many dims": _one_of_sixty_dims,
    "shape of strings": _tensor(shape=["4", "2"]),
    "tensor of another kind": lambda index: index["tensors"].update(w=None),
    "tensors of another kind": _top(tensors=[]),
    "files of another kind": _top(files=["a.safetensors"]),
    "state of another kind": _top(state="x"),
    "iteration of another kind": _top(iteration="7"),
    "no iteration": lambda index: index.pop("iteration"),
    "version from the future": _top(version=2),
    "version zero": _top(version=0),
    "version of another kind": _top(version=True),
    "another format": _top(format="pt"),
    "no format": lambda index: index.pop("format"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_index(good: Path, lie: str) -> None:
    index = hand_written(good)
    LIES[lie](index)
    (good / "index.json").write_text(json.dumps(index))
    reject(good)


GARBAGE: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"PK\x03\x04",
    "not UTF-8": b'{"format": "\xff"}',
    "cut": b'{"format": "megatron_ds.checkpoint", "version": 1, "iter',
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "deep": b"[" * 200_000,
    "repeated key": b'{"format": "megatron_ds.checkpoint", "version": 1, "version": 1}',
    "NaN": b'{"format": "megatron_ds.checkpoint", "version": NaN}',
    "number of ten thousand digits": b'{"version": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_as_index(good: Path, kind: str) -> None:
    (good / "index.json").write_bytes(GARBAGE[kind])
    reject(good, "index.json")


@pytest.mark.parametrize("name", ["", "two words", "\x1b[2J", "\u202e", "x" * 513])
def test_name_that_a_terminal_should_not_see(good: Path, name: str) -> None:
    index = hand_written(good)
    index["tensors"][name] = index["tensors"].pop("w")
    (good / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="name") as caught:
        read_index(good)
    assert caught.value.render().isascii()
    assert "\x1b" not in caught.value.render()


def test_future_version_is_named_and_never_passed_over(good: Path) -> None:
    shutil.copytree(good, good.with_name("iter_0000003"))
    (good / "index.json").write_text(json.dumps(hand_written(good) | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2") as caught:
        find(good.parent)
    assert "update" in caught.value.fix


def test_iteration_of_another_directory(good: Path) -> None:
    good.rename(good.with_name("iter_0000009"))
    with pytest.raises(CheckpointError, match="iteration 7"):
        find(good.parent, 9)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


TRUE_ENTRY = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}
SHARDS: dict[str, bytes] = {
    "zero bytes": b"",
    "length only": (2).to_bytes(8, "little"),
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "header past the end": (3).to_bytes(8, "little") + b"{}",
    "zeros": bytes(200),
    "no JSON": (4).to_bytes(8, "little") + b"abcd" + bytes(24),
    "a list": (2).to_bytes(8, "little") + b"[]" + bytes(24),
    "no keys": header() + bytes(24),
    "data cut": header(**{"w#0": TRUE_ENTRY}) + bytes(20),
    "one key too many": header(**{"w#0": TRUE_ENTRY, "x": TRUE_ENTRY}) + bytes(24),
    "other dtype": header(**{"w#0": TRUE_ENTRY | {"dtype": "I32"}}) + bytes(24),
    "other shape": header(**{"w#0": TRUE_ENTRY | {"shape": [2, 3]}}) + bytes(24),
    "offsets cross": header(**{"w#0": TRUE_ENTRY | {"data_offsets": [24, 0]}}) + bytes(24),
    "negative offset": header(**{"w#0": TRUE_ENTRY | {"data_offsets": [-24, 0]}}) + bytes(24),
    "offset past the end": header(**{"w#0": TRUE_ENTRY | {"data_offsets": [2**62, 2**62 + 24]}}) + bytes(24),
    "offsets too short": header(**{"w#0": TRUE_ENTRY | {"data_offsets": [0, 4]}}) + bytes(24),
    "offsets of another kind": header(**{"w#0": TRUE_ENTRY | {"data_offsets": "0:24"}}) + bytes(24),
    "entry of another kind": header(**{"w#0": 24}) + bytes(24),
    "repeated key": (
        (2 * len(json.dumps({"w#0": TRUE_ENTRY}))).to_bytes(8, "little")
        + (json.dumps({"w#0": TRUE_ENTRY})[:-1] + ", " + json.dumps({"w#0": TRUE_ENTRY})[1:]).encode()
        + bytes(24)
    ),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_lying_shard_of_the_size_in_the_index(good: Path, kind: str) -> None:
    (good / "a.safetensors").write_bytes(SHARDS[kind])
    (good / "index.json").write_text(json.dumps(hand_written(good)))
    reject(good, "a.safetensors")


@pytest.mark.parametrize("size", [0, 8, 50, -1])
def test_truncated_shard(good: Path, size: int) -> None:
    shard = good / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    reject(good, "b.safetensors")


def test_linked_shard(good: Path) -> None:
    moved = good.parent / "elsewhere"
    (good / "a.safetensors").rename(moved)
    (good / "a.safetensors").symlink_to(moved)
    assert "link" in reject(good, "a.safetensors").found


def test_linked_index(good: Path) -> None:
    (good / "index.json").rename(good.parent / "elsewhere")
    (good / "index.json").symlink_to(good.parent / "elsewhere")
    reject(good, "index.json")


def test_shard_swapped_for_a_link_after_the_index_was_read(good: Path) -> None:
    index = read_index(good)
    (good / "a.safetensors").rename(good.parent / "elsewhere")
    (good / "a.safetensors").symlink_to(good.parent / "elsewhere")
    target = torch.full((4, 2), -1.0)
    with pytest.raises(CheckpointError):
        load(index, [whole_piece("w", target)])
    assert torch.equal(target, torch.full((4, 2), -1.0))


def test_directory_in_place_of_a_shard(good: Path) -> None:
    (good / "a.safetensors").unlink()
    (good / "a.safetensors").mkdir()
    reject(good, "a.safetensors")
