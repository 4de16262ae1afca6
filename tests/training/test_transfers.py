"""When micro-batches are copied to the device, and what waits for them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ds.data.batch import GPTBatch
from megatron_ds.model import recompute
from megatron_ds.training import transfers
from megatron_ds.training.transfers import Microbatches, OnItsWay, to_device


class Given:
    """A batch on the host."""

    def __init__(self, number: int, seen: list[str]):
        self.number, self.seen = number, seen

    def to(self, device: torch.device) -> Any:
        """A batch on the device, whose one tensor can be told who uses it."""
        self.seen.append(f"copy {self.number}")
        tensor = SimpleNamespace(record_stream=lambda stream: self.seen.append(f"{self.number} is used on {stream}"))
        return SimpleNamespace(tokens=tensor, documents=None)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices that streams are made for, none of which outlives the test."""
    made: list[torch.device] = []

    def make(device: torch.device) -> Any:
        made.append(device)
        number = iter("abcdef")
        return SimpleNamespace(record_event=lambda: f"mark {next(number)}", wait_stream=lambda stream: None)

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for room in (transfers, recompute):
        monkeypatch.setattr(room, "_copying", cache(room._copying.__wrapped__))
    return made


def microbatches(seen: list[str], device: str = "cpu", **options: int) -> Microbatches:
    return Microbatches([Given(i, seen) for i in range(3)], [10, 12, 14], torch.device(device), **options)


def test_each_is_copied_when_the_one_before_is_asked_for() -> None:
    seen: list[str] = []
    found = microbatches(seen)
    assert len(found) == 3 and seen == ["copy 0"]
    assert found[0].row == 10 and seen == ["copy 0", "copy 1"]
    assert found[1].row == 12 and seen == ["copy 0", "copy 1", "copy 2"]
    assert found[2].row == 14 and len(seen) == 3


def test_all_at_once() -> None:
    seen: list[str] = []
    microbatches(seen, ahead=3)
    assert seen == ["copy 0", "copy 1", "copy 2"]


def test_each_chunk_asks_once_and_then_the_copy_is_gone() -> None:
    seen: list[str] = []
    found = microbatches(seen, uses=2)
    first = found[0].batch
    assert found[1].batch is not first and found[0].batch is first
    with pytest.raises(KeyError):
        found[0]
    assert found[1].row == 12 and seen == ["copy 0", "copy 1", "copy 2"]


def test_the_order_of_waits_on_a_gpu(streams: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies go on a stream of their own; who computes waits for the one that it needs, and keeps its memory."""
    seen: list[str] = []

    class Computing:
        def wait_event(self, event: str) -> None:
            seen.append(f"compute waits for {event}")

        def __str__(self) -> str:
            return "compute"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computing())
    found = microbatches(seen, "cuda")
    found[0]
    assert seen == ["copy 0", "copy 1", "compute waits for mark a", "0 is used on compute"]
    found[1]
    assert seen[4:] == ["copy 2", "compute waits for mark b", "1 is used on compute"]


def test_a_device_has_one_stream_of_copies_to_it_and_one_from_it(
    streams: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps there are, and inputs of recomputed layers that go to the host."""
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        microbatches([], device)
    assert streams == [torch.device("cuda:0"), torch.device("cuda:1")]
    del streams[:]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "computing")
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: SimpleNamespace(copy_=lambda *_, **__: None))
    used: list[Any] = []
    for _ in range(3):
        x: Any = SimpleNamespace(device=torch.device("cuda:0"), record_stream=used.append)
        recompute._to_host(x)
    assert streams == [torch.device("cuda:0")] and len(used) == 3 and used[0] is used[2]


def test_real_batches_arrive() -> None:
    one = GPTBatch(*(torch.zeros(2, 4) for _ in range(4)))
    found = Microbatches([one], [0], torch.device("meta"))[0].batch
    assert {t.device.type for t in (found.tokens, found.labels, found.loss_mask)} == {"meta"}
    assert found.documents is None and one.tokens.device.type == "cpu"


def test_on_a_cpu_nothing_is_copied() -> None:
    values = torch.arange(3.0)
    assert to_device(values, torch.device("cpu")) is values
    assert OnItsWay(values).wait() is values
