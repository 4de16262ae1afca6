"""The pair on disk: bytes against hand-written ones, and a message for each way of being damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data import indexed_builder
from megatron_ds.data.indexed import IndexedDataset, token_dtype
from megatron_ds.data.indexed_builder import IndexedDatasetBuilder
from megatron_ds.errors import DataError
from tests.data.pairs import write_pair

IDX = bytes.fromhex(
    "4D 4D 49 44 49 44 58 00 00"  # MMIDIDX
    "01 00 00 00 00 00 00 00"  # version 1
    "08"  # uint16
    "03 00 00 00 00 00 00 00"  # 3 sequences
    "04 00 00 00 00 00 00 00"  # 3 documents, 4 bounds
    "02 00 00 00  01 00 00 00  03 00 00 00"  # lengths 2 1 3
    "00 00 00 00 00 00 00 00  04 00 00 00 00 00 00 00  06 00 00 00 00 00 00 00"  # offsets 0 4 6
    "00 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00"  # document 0 is sequences 0 and 1
    "02 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00"  # document 1 is empty, document 2 is sequence 2
)
BIN = bytes.fromhex("05 00 07 00  FF FF  01 00 02 00 03 01")


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    (tmp_path / "a.idx").write_bytes(IDX)
    (tmp_path / "a.bin").write_bytes(BIN)
    return str(tmp_path / "a")


def broken(prefix: str, at: int, new: bytes) -> str:
    """The error after some bytes of the index are replaced."""
    Path(f"{prefix}.idx").write_bytes(IDX[:at] + new + IDX[at + len(new) :])
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    assert caught.value.exit_code == 3 and caught.value.subject.endswith((".idx", ".bin"))
    return str(caught.value)


@pytest.mark.parametrize("mmap_bin", [True, False])
def test_reads_hand_written_bytes(prefix: str, mmap_bin: bool) -> None:
    data = IndexedDataset(prefix, mmap_bin)
    assert [data[i].tolist() for i in range(len(data))] == [[5, 7], [65535], [1, 2, 259]]
    assert data.document_indices.tolist() == [0, 2, 2, 3]
    assert data.read(2, 1, 1).tolist() == [2] and data.read(2, 1).tolist() == [2, 259]
    assert [data.document_of(i) for i in range(3)] == [0, 0, 2]
    assert data.id_range() == (0, 65535) and data.first_id_outside(259) == (1, 65535)
    assert data.first_id_outside(65536) is None
    with pytest.raises(IndexError):
        data.read(0, 1, 2)


@pytest.mark.parametrize("how", ["items", "documents", "block"])
def test_writes_hand_written_bytes(tmp_path: Path, how: str) -> None:
    with IndexedDatasetBuilder(str(tmp_path / "new" / "a"), np.uint16) as builder:
        if how == "items":
            for row, last in (([5, 7], False), ([65535], True)):
                builder.add_item(row)
                if last:
                    builder.end_document()
            builder.end_document()
            builder.add_item(np.array([1, 2, 259]))
            builder.end_document()
        elif how == "documents":
            builder.add_document([5, 7, 65535], [2, 1])
            builder.add_document([], [])
            builder.add_document([1, 2, 259], [3])
        else:
            builder.add_block([5, 7, 65535, 1, 2, 259], [2, 1, 3], [2, 0, 1])
        assert (builder.documents, builder.sequences, builder.tokens, builder.max_token_id) == (3, 3, 6, 65535)
        builder.finalize()
    assert (tmp_path / "new" / "a.idx").read_bytes() == IDX and (tmp_path / "new" / "a.bin").read_bytes() == BIN
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.bin", "a.idx"]


def test_add_index_concatenates(tmp_path: Path, prefix: str) -> None:
    with IndexedDatasetBuilder(str(tmp_path / "twice"), np.uint16) as builder:
        builder.add_index(prefix)
        builder.add_index(prefix)
        builder.finalize()
    rows = [[5, 7, 65535], [], [1, 2, 259]]
    data = IndexedDataset(str(tmp_path / "twice"))
    assert data.document_indices.tolist() == [0, 2, 2, 3, 5, 5, 6]
    assert np.concatenate([data[i] for i in range(6)]).tolist() == [token for row in rows + rows for token in row]
    with IndexedDatasetBuilder(str(tmp_path / "other"), np.int32) as builder:
        with pytest.raises(DataError, match=r"uint16(.|\n)*int32"):
            builder.add_index(prefix)


def test_builder_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="70000"), IndexedDatasetBuilder(str(tmp_path / "a"), np.uint16) as builder:
        builder.add_document([70000], [1])
    assert not list(tmp_path.iterdir())


def test_builder_stopped_while_it_opens_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def struck(*args: Any) -> None:
        open(*args).close()  # the file is there, and SIGTERM comes before anybody holds it
        raise SystemExit(143)

    monkeypatch.setattr(indexed_builder, "open", struck, raising=False)
    with IndexedDatasetBuilder(str(tmp_path / "a"), np.uint16) as builder:
        assert not list(tmp_path.iterdir())  # nothing before the `with` has begun
        with pytest.raises(SystemExit):
            builder.add_document([7], [1])
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_token_dtype() -> None:
    assert [token_dtype(n).name for n in (100, 65499, 65500, 128000)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.parametrize(
    ("at", "new", "said"),
    [
        (0, b"\x50\x4b\x03\x04", "50 4B 03 04 49 44 58 00 00"),
        (0, b"TNTIDX\x00\x00", "TNTIDX"),
        (9, b"\x02", "version 2"),
        (17, b"\x0b", "token type code 11"),
        (17, b"\x07", "float32"),
        (18, b"\x04", "4 sequences"),
        (18, b"\xff" * 8, "18446744073709551615 sequences"),
        (26, b"\xff" * 7, "document bounds"),
        (34, b"\xff" * 4, "length -1"),
        (34, b"\x03", "byte offsets"),
        (46 + 8, b"\x06", "byte offsets"),
        (70, b"\x01", "document bounds from 1 to 3"),
        (70 + 24, b"\x02", "document bounds from 0 to 2"),
        (70 + 8, b"\x03", "that fall"),
    ],
)
def test_every_damaged_field_is_named(prefix: str, at: int, new: bytes, said: str) -> None:
    assert said in broken(prefix, at, new)


@pytest.mark.parametrize("size", [0, 5, 20, 33, 40, len(IDX) - 1])
def test_truncated_index(prefix: str, size: int) -> None:
    Path(f"{prefix}.idx").write_bytes(IDX[:size])
    with pytest.raises(DataError, match=r"a\.idx"):
        IndexedDataset(prefix)


def test_wrong_bin_size(prefix: str) -> None:
    Path(f"{prefix}.bin").write_bytes(BIN[:-2])
    with pytest.raises(DataError, match=r"10 bytes \(truncated(.|\n)*12 bytes: 6 tokens"):
        IndexedDataset(prefix)
    Path(f"{prefix}.bin").write_bytes(BIN + b"\x00")
    with pytest.raises(DataError, match="too long"):
        IndexedDataset(prefix)


def test_append_eod_fault_is_recognised(prefix: str) -> None:
    """Two documents with tokens, and a token more in the .bin for each."""
    Path(f"{prefix}.bin").write_bytes(BIN + b"\x00" * 4)
    with pytest.raises(DataError, match=r"Megatron-DeepSpeed's --append-eod"):
        IndexedDataset(prefix)


def test_missing_files(prefix: str) -> None:
    with pytest.raises(DataError, match=r"neither b\.idx nor b\.bin"):
        IndexedDataset(prefix[:-1] + "b")
    with pytest.raises(DataError, match="leave the ending off"):
        IndexedDataset(prefix + ".bin")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin(.|\n)*a\.idx is there"):
        IndexedDataset(prefix)


def test_three_billion_tokens(tmp_path: Path) -> None:
    """Offsets beyond 2^32: the last of three documents of 10^9 tokens, in a sparse file."""
    length = 10**9
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4)
    tables = struct.pack("<3i3q4q", *[length] * 3, *[4 * length * i for i in range(3)], 0, 1, 2, 3)
    (tmp_path / "big.idx").write_bytes(header + tables)
    with open(tmp_path / "big.bin", "wb") as file:
        file.seek(12 * length - 4)
        file.write(struct.pack("<i", 77))
    for mmap_bin in (True, False):
        data = IndexedDataset(str(tmp_path / "big"), mmap_bin)
        assert data.read(2, length - 2).tolist() == [0, 77]


def test_fingerprint_sees_a_replaced_bin(tmp_path: Path) -> None:
    first = IndexedDataset(write_pair(tmp_path / "a", [[1, 2], [3]])).fingerprint
    assert IndexedDataset(write_pair(tmp_path / "b", [[1, 2], [3]])).fingerprint == first
    assert IndexedDataset(write_pair(tmp_path / "a", [[1, 2], [4]])).fingerprint != first
    assert IndexedDataset(write_pair(tmp_path / "a", [[1], [2, 3]])).fingerprint != first
