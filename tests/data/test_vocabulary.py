"""What is compared before step 1: with a sidecar, without one, and when a scan can be spared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import vocabulary
from megatron_ds.data.indexed import IndexedDataset
from megatron_ds.data.sidecar import Sidecar, merged, read_sidecar
from megatron_ds.data.vocabulary import check_vocabulary
from megatron_ds.errors import DataError
from tests.data.pairs import write_pair

SIDECAR = Sidecar(
    tokenizer_type="GPT2BPETokenizer",
    tokenizer_fingerprint="f00",
    vocab_size=100,
    eod=0,
    append_eod=True,
    max_token_id=80,
    documents=2,
    sequences=2,
    tokens=5,
)


def pair(tmp_path: Path, rows: list[list[int]], sidecar: Sidecar | None = None) -> IndexedDataset:
    prefix = write_pair(tmp_path / "a", rows)
    if sidecar is not None:
        Path(f"{prefix}.json").write_text(sidecar.to_json())
    return IndexedDataset(prefix)


def test_sidecar_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pair(tmp_path, [[1, 80], [2, 3, 4]], SIDECAR)
    monkeypatch.setattr(data, "id_range", lambda: pytest.fail("the .bin was read"))
    check_vocabulary(data, 81, "f00")
    with pytest.raises(DataError, match=r"token id 80 in document 0(.|\n)*vocabulary of 80"):
        check_vocabulary(data, 80, "f00")


def test_another_tokenizer_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pair(tmp_path, [[1, 80], [2, 3, 4]], SIDECAR)
    check_vocabulary(data, 100, "f00")
    assert capsys.readouterr().err == ""
    check_vocabulary(data, 100, "bad")
    assert "another tokenizer" in capsys.readouterr().err


def test_sidecar_of_other_data_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pair(tmp_path, [[1, 99], [2, 3]], SIDECAR)
    with pytest.raises(DataError, match="token id 99"):
        check_vocabulary(data, 90, None)
    assert "another dataset" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", '{"text": "a corpus of this name"}', "x" * 100_000])
def test_a_foreign_json_is_no_sidecar(tmp_path: Path, content: str) -> None:
    data = pair(tmp_path, [[1], [2]])
    Path(f"{data.prefix}.json").write_text(content)
    assert read_sidecar(data.prefix) is None
    check_vocabulary(data, 3, "f00")


def test_the_scan_is_spared_where_it_can_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pair(tmp_path, [[1, 50], [2]])
    check_vocabulary(data, 51, None)
    with pytest.raises(DataError, match="token id 50"):
        check_vocabulary(data, 50, None)
    monkeypatch.setattr(data, "id_range", lambda: pytest.fail("the .bin was read"))
    check_vocabulary(data, 65536, None)  # uint16 cannot hold a larger id
    monkeypatch.setattr(vocabulary, "_MAX_SCAN_BYTES", 5)
    check_vocabulary(data, 60, None)


def test_merged_sidecars() -> None:
    other = Sidecar(**{**vars(SIDECAR), "max_token_id": 90, "tokens": 7})
    both = merged([SIDECAR, other])
    assert both is not None and (both.max_token_id, both.documents, both.tokens) == (90, 4, 12)
    assert merged([SIDECAR, Sidecar(**{**vars(SIDECAR), "tokenizer_fingerprint": "x"})]) is None


def test_int32_scan(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "b", [[7], list(np.arange(70000)[-3:])], "int32")
    with pytest.raises(DataError, match="token id 69998 in document 1"):
        check_vocabulary(IndexedDataset(prefix), 69998, None)
