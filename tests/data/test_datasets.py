"""From flags to samples, against tokens laid out by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data.blend import BlendedDataset, TokenDataset
from megatron_ds.data.config import DataConfig
from megatron_ds.data.datasets import Datasets, build_gpt_datasets
from megatron_ds.data.gpt import GPTDataset
from megatron_ds.errors import ConfigError, DataError
from tests.data.pairs import random_documents, write_pair


def build(samples: tuple[int, int, int], seq: int = 8, vocab_size: int = 90, **flags: object) -> Datasets:
    config = DataConfig(**flags)  # type: ignore[arg-type]
    return build_gpt_datasets(config, num_samples=samples, seq_length=seq, seed=5, vocab_size=vocab_size)


@pytest.fixture
def documents() -> list[list[int]]:
    return random_documents(np.random.default_rng(0), 60, 20)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_pair(tmp_path / "corpus", documents)


@pytest.mark.parametrize("mmap_bin_files", [True, False])
def test_rows_are_cut_from_the_shuffled_documents(
    prefix: str, documents: list[list[int]], mmap_bin_files: bool
) -> None:
    sets = build((150, 4, 2), data_path=(prefix,), split="80,10,10", mmap_bin_files=mmap_bin_files)
    for dataset, (begin, end), least in zip(
        (sets.train, sets.valid, sets.test), ((0, 48), (48, 54), (54, 60)), (150, 4, 2), strict=True
    ):
        assert isinstance(dataset, GPTDataset) and len(dataset) >= least
        assert set(dataset.index.documents) == set(range(begin, end))
        row = np.concatenate([documents[d] for d in dataset.index.documents])
        for i in range(len(dataset)):
            start = int(dataset.index.shuffle[i]) * 8
            assert dataset[i].tolist() == row[start : start + 9].tolist() and dataset[i].dtype == np.int64


def test_no_samples_asked_or_no_share_is_none(prefix: str) -> None:
    sets = build((5, 0, 3), data_path=(prefix,), split="90,10,0")
    assert sets.train is not None and sets.valid is None and sets.test is None


def test_empty_part_is_an_error_with_sizes(prefix: str) -> None:
    with pytest.raises(DataError) as caught:
        build((5, 1, 1), data_path=(prefix,), split="969,30,1")
    message = str(caught.value)
    assert "training 58, validation 2, test 0 of 60 documents" in message and "--eval-iters 0" in message
    assert build((5, 1, 0), data_path=(prefix,), split="969,30,1").test is None
    with pytest.raises(DataError, match="no tokens for training"):
        build((5, 0, 0), data_path=(prefix,), split="0,1,1")


def test_separate_paths_use_all_documents(tmp_path: Path) -> None:
    train = write_pair(tmp_path / "train", [[1] * 50])
    valid = write_pair(tmp_path / "valid", [[2] * 50])
    sets = build((3, 3, 3), train_data_path=(train,), valid_data_path=(valid,))
    assert sets.train is not None and sets.valid is not None and sets.test is None
    assert set(sets.train[0]) == {1} and set(sets.valid[0]) == {2}


def test_contradicting_and_missing_paths(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--train-data-path"):
        build((1, 0, 0), data_path=(prefix,), train_data_path=(prefix,))
    with pytest.raises(ConfigError, match="--mock-data"):
        build((1, 0, 0))
    with pytest.raises(DataError, match="nowhere"):
        build((1, 0, 0), data_path=("nowhere",))


def sources_of(dataset: TokenDataset | None) -> list[int]:
    assert isinstance(dataset, BlendedDataset)
    return [int(dataset[i][0]) for i in range(len(dataset))]


def test_weighted_blend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Source A is all ones, B all twos; B is repeated until it gives its share."""
    a, b = write_pair(tmp_path / "a", [[1] * 900]), write_pair(tmp_path / "b", [[2] * 20])
    first = sources_of(build((100, 0, 0), data_path=("3", a, "1", b), split="1").train)
    assert first[:5] == [1, 2, 1, 1, 1] and first.count(2) == 25 and len(first) == 100
    out = capsys.readouterr().out
    assert f"75.0%     0.667 epochs of 900 tokens  {a}" in out and f"25.0%    10.000 epochs of 20 tokens  {b}" in out


def test_unweighted_blend_is_by_length_and_one_epoch(tmp_path: Path) -> None:
    """25 tokens give 3 samples of 8, 9 tokens give 1."""
    a, b = write_pair(tmp_path / "a", [[1] * 25]), write_pair(tmp_path / "b", [[2] * 9])
    assert sorted(sources_of(build((4, 0, 0), data_path=(a, b), split="1").train)) == [1, 1, 1, 2]
    with pytest.raises(DataError, match=r"4 samples in one epoch of 2 datasets(.|\n)*5 samples"):
        build((5, 0, 0), data_path=(a, b), split="1")
    assert len(sources_of(build((5, 0, 0), data_path=(a, b), split="1", dataloader_type="cyclic").train)) == 4


def test_wrong_id_stops_at_start_and_names_the_document(tmp_path: Path) -> None:
    rows = [[1] * 20, [2] * 20, [3, 50300, 4], [5] * 20]
    prefix = write_pair(tmp_path / "a", rows)
    with pytest.raises(DataError) as caught:
        build((1, 0, 0), vocab_size=50257, data_path=(prefix,), split="1")
    message = str(caught.value)
    assert f"{prefix}.bin" in message and "token id 50300 in document 2" in message and "50257" in message


def test_wrong_id_is_found_when_read(tmp_path: Path) -> None:
    """A .bin that changed after its id range was kept."""
    prefix = write_pair(tmp_path / "a", [[1] * 20, [2] * 20])
    dataset = build((1, 0, 0), data_path=(prefix,), split="1").train
    assert dataset is not None
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * 21)
        file.write(b"\xff\x00")
    with pytest.raises(DataError, match="token id 255 in document 1"):
        [dataset[i] for i in range(len(dataset))]


def test_negative_id_is_refused(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "a", [[1] * 20, [2, -7, 3]], "int32")
    with pytest.raises(DataError, match="token id -7 in document 1"):
        build((1, 0, 0), data_path=(prefix,), split="1")


def test_cache_follows_the_data(tmp_path: Path) -> None:
    """Beside the data; a second build reads it, replaced data do not get the old index."""
    prefix = write_pair(tmp_path / "a", [[1] * 20, [2] * 20])
    folder = tmp_path / "cache" / "GPTDataset_indices"

    def folders() -> set[str]:
        return {path.name for path in folder.iterdir()}

    build((3, 0, 0), data_path=(prefix,), split="1")
    first = folders()
    build((3, 0, 0), data_path=(prefix,), split="1")
    assert folders() == first and {name.split("-")[0] for name in first} == {"gpt"}
    write_pair(tmp_path / "a", [[3] * 7, [4] * 33])
    dataset = build((3, 0, 0), data_path=(prefix,), split="1").train
    assert dataset is not None and {int(t) for i in range(len(dataset)) for t in dataset[i]} == {3, 4}
    assert folders() > first
    build((3, 0, 0), data_path=(prefix,), split="1", data_cache_path=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere").is_dir()


def test_processes_share_one_cache(tmp_path: Path) -> None:
    """Four at once, without a process group: the same rows, one folder each for index and id range."""
    prefix = write_pair(tmp_path / "a", random_documents(np.random.default_rng(1), 50, 30))
    code = (
        "import sys; from tests.data.test_datasets import build\n"
        f"d = build((40, 0, 0), data_path=({prefix!r},), split='1').train\n"
        "print([d[i].tolist() for i in range(3)])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "RANK": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(4)
    ]
    outputs = {process.communicate(timeout=60)[0] for process in started}
    assert len(outputs) == 1 and all(process.returncode == 0 for process in started)
    assert len(list((tmp_path / "cache" / "GPTDataset_indices").iterdir())) == 1


def test_without_shuffling_rows_follow_the_files(prefix: str, documents: list[list[int]]) -> None:
    """Also into a second epoch: sample i is tokens [8 i, 8 i + 8] of the documents as they are."""
    row = np.concatenate(documents * 2)
    dataset = build((len(row) // 8 - 2, 0, 0), data_path=(prefix,), split="1", shuffle=False).train
    assert dataset is not None
    for i in range(len(dataset)):
        assert dataset[i].tolist() == row[8 * i : 8 * i + 9].tolist()


def test_mock_data_needs_no_files() -> None:
    sets = build((4, 2, 0), mock_data=True)
    assert sets.train is not None and sets.valid is not None and sets.test is None
    assert len(sets.train) == 4 and sets.train[3].shape == (9,) and 0 <= sets.train[3].min() <= sets.train[3].max() < 90
    again = build((4, 2, 0), mock_data=True).train
    assert again is not None and again[3].tolist() == sets.train[3].tolist()
    assert sets.valid[0].tolist() != sets.train[0].tolist()


def test_data_path_needs_no_torch() -> None:
    """Preprocessing and planning must start fast."""
    code = "import sys, megatron_ds.data.preprocess, megatron_ds.data.datasets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
