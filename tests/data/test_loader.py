"""Batches: masks and positions by hand, order and faults through threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_ds.data.batch import GPTBatch, collate_for, collate_gpt
from megatron_ds.data.config import DataConfig
from megatron_ds.data.loader import MicrobatchLoader
from megatron_ds.errors import ConfigError, DataError

EOD = 9


class Rows:
    """Row i is i, i + 1, i + 2; later rows are faster, and one may be broken."""

    def __init__(self, count: int, broken: int = -1):
        self.count, self.broken = count, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        self.read.append(row)
        time.sleep(0.004 if row % 3 == 0 else 0.0)
        if row == self.broken:
            raise DataError("a.bin", found="token id 99 in document 3")
        return np.arange(row, row + 3)


def loader(rows: Rows, workers: int, consumed: int = 0, rank: int = 0, device: str = "cpu") -> MicrobatchLoader:
    return MicrobatchLoader(
        rows,
        consumed_samples=consumed,
        micro_batch_size=2,
        dp_rank=rank,
        dp_size=2,
        collate=collate_for("GPT", DataConfig(), None),
        num_workers=workers,
        device=torch.device(device),
    )


def gpt_batch(rows: npt.NDArray[np.int64], eod: int, **options: bool) -> GPTBatch:
    return collate_gpt(list(rows), DataConfig(**options), eod)


def test_batch_by_hand() -> None:
    rows = np.array([[1, EOD, 2, 3, EOD, EOD, 4], [EOD, 5, 6, 7, 8, 5, EOD]])
    batch = gpt_batch(rows, EOD, eod_mask_loss=True, reset_position_ids=True)
    assert batch.tokens.tolist() == [[1, 9, 2, 3, 9, 9], [9, 5, 6, 7, 8, 5]]
    assert batch.labels.tolist() == [[9, 2, 3, 9, 9, 4], [5, 6, 7, 8, 5, 9]]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]
    kinds = [t.dtype for t in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)]
    assert kinds == [torch.int64, torch.int64, torch.float32, torch.int64]
    plain = gpt_batch(rows, EOD)
    assert plain.loss_mask.tolist() == [[1.0] * 6] * 2 and plain.position_ids.tolist() == [list(range(6))] * 2
    assert torch.equal(batch.to("cpu").labels, batch.labels)


def test_position_ids_equal_the_definition() -> None:
    """For each end of document at i, all later positions lose i + 1 minus what they have lost already."""
    rng = np.random.default_rng(0)
    rows = rng.integers(6, 10, (20, 33))
    found = gpt_batch(rows, EOD, reset_position_ids=True).position_ids
    for row, positions in zip(rows, found.tolist(), strict=True):
        wanted, lost = list(range(32)), 0
        for i in range(32):
            if row[i] == EOD:
                wanted[i + 1 :] = [p - (i + 1 - lost) for p in wanted[i + 1 :]]
                lost = i + 1
        assert positions == wanted


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_and_end(workers: int) -> None:
    batches = loader(Rows(14), workers, consumed=4, rank=1)
    assert [next(batches).tokens[:, 0].tolist() for _ in range(2)] == [[6, 7], [10, 11]]
    for _ in range(2):
        with pytest.raises((DataError, StopIteration)):
            next(batches)
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_is_no_surprise(workers: int) -> None:
    """Reading ahead does not bring the error forward, and the error has the numbers."""
    batches = loader(Rows(9), workers)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataError, match="9 samples, 8 of them consumed"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_fault_in_a_thread_surfaces_in_its_turn(workers: int) -> None:
    batches = loader(Rows(100, broken=5), workers)
    assert next(batches).tokens[:, 0].tolist() == [0, 1]
    with pytest.raises(DataError, match="document 3"):
        next(batches)
    batches.close()


def test_documents_and_given_rows() -> None:
    rows = np.array([[1, EOD, 2, 3, EOD, EOD, 4]])
    assert gpt_batch(rows, EOD).documents is None
    batch = gpt_batch(rows, EOD, reset_attention_mask=True)
    assert batch.documents is not None and batch.documents.tolist() == [[0, 0, 1, 1, 1, 2]]
    cut = batch.at(torch.tensor([1, 4]))
    assert cut.tokens.tolist() == [[9, 9]] and cut.documents is batch.documents
    given = {"tokens": np.array([1, 2]), "labels": np.array([2, 3]), "loss_mask": np.array([0, 1])}
    found = collate_gpt([given], DataConfig(), None)
    assert (found.tokens.tolist(), found.labels.tolist(), found.loss_mask.tolist()) == (
        [[1, 2]],
        [[2, 3]],
        [[0.0, 1.0]],
    )
    assert found.position_ids.tolist() == [[0, 1]]
    assert collate_gpt([{"text": np.array([4, 5, 6])}], DataConfig(), None).labels.tolist() == [[5, 6]]


def test_bert_and_t5_batches_by_hand() -> None:
    row = {
        "text": np.array([2, 7, 3, 0]),
        "types": np.array([0, 0, 0, 0]),
        "labels": np.array([-1, 5, -1, -1]),
        "is_random": 1,
        "loss_mask": np.array([0, 1, 0, 0]),
        "padding_mask": np.array([1, 1, 1, 0]),
        "truncated": 0,
    }
    batch = collate_for("BERT", DataConfig(), None)([row, row])
    assert batch.labels.tolist() == [[0, 5, 0, 0]] * 2 and batch.documents.tolist() == [[0, 0, 0, 1]] * 2
    assert batch.num_targets().tolist() == [2, 2]
    late = batch.at(torch.tensor([2, 3]))  # the part of a rank without the first position
    assert late.num_targets().tolist() == [0, 0] and late.position_ids.tolist() == [[2, 3]] * 2
    t5 = {
        "text_enc": np.array([7, 9, 0]),
        "text_dec": np.array([1, 9]),
        "labels": np.array([9, -1]),
        "loss_mask": np.array([1, 0]),
        "enc_mask": np.array([1, 1, 0]),
        "dec_mask": np.array([1, 1]),
    }
    both = collate_for("T5", DataConfig(), None)([t5])
    assert both.labels.tolist() == [[9, 0]] and both.encoder_documents.tolist() == [[0, 0, 1]]


def test_rows_that_do_not_fit_are_told() -> None:
    with pytest.raises(DataError, match="'text'"):
        collate_for("BERT", DataConfig(), None)([{"tokens": np.arange(4)}])
    with pytest.raises(DataError, match="--seq-length"):
        collate_for("GPT", DataConfig(seq_length=9), None)([np.arange(5)])
    square = {"text_enc": np.arange(3), "text_dec": np.arange(2), "labels": np.arange(2), "loss_mask": np.ones(2)}
    square["enc_mask"] = np.outer([1, 1, 0], [1, 1, 0])  # as Megatron-DeepSpeed makes it
    assert collate_for("T5", DataConfig(), None)([square]).encoder_documents.tolist() == [[0, 0, 1]]


def test_masks_need_an_end_of_document() -> None:
    with pytest.raises(ConfigError, match="--eod-mask-loss"):
        collate_for("GPT", DataConfig(eod_mask_loss=True), None)


def test_close_ends_the_threads() -> None:
    before = threading.active_count()
    batches = loader(Rows(1000), 3)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_reads_ahead_but_not_everything() -> None:
    rows = Rows(1000)
    batches = loader(rows, 2)
    next(batches)
    time.sleep(0.1)
    batches.close()
    assert 4 <= len(rows.read) <= 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_batches_are_pinned_where_they_are_read(device: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the threads, if there are any, each on the GPU of the run; and only if there is one."""
    pinned_by: list[str] = []
    current: dict[str, torch.device] = {}

    def pinned(self: GPTBatch) -> GPTBatch:
        pinned_by.append(threading.current_thread().name)
        return self

    def set_device(device: torch.device) -> None:
        current[threading.current_thread().name] = device

    monkeypatch.setattr(GPTBatch, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    batches = loader(Rows(100), workers, device=device)
    assert [next(batches).tokens[0, 0].item() for _ in range(2)] == [0, 4]
    batches.close()
    if device == "cpu":
        assert not pinned_by and not current
        return
    assert len(pinned_by) >= 2 and all(name.startswith("data") == bool(workers) for name in pinned_by)
    assert current == (dict.fromkeys(pinned_by, torch.device(device)) if workers else {})
