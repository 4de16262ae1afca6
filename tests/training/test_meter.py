"""--report-costs: which steps are weighed and timed, and what the page says."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

from megatron_ds.training.costs import Costs, Held
from megatron_ds.training.meter import Account, Meter, page
from megatron_ds.training.step import train_step
from tests.helpers.ranks import run_ranks
from tests.helpers.recipe import run
from tests.parity import harness
from tests.parity.harness import STYLES, arguments, batches, fresh, start

COSTS = Costs(8, Held(10, 20, 40, 120), Counter({"pp send": 1024}), 3000, 4000, 2.5)


def test_an_account_survives_the_way_to_other_ranks() -> None:
    account = Account(1, COSTS, dataclasses.replace(COSTS, activation_bytes=3001), 0.5, 2.0, 7)
    back = Account.decode(account.encode())
    assert back == account
    assert back.measured.held.grads_bytes == 40
    assert back.measured.sent["nothing"] == 0


def test_the_page_has_both_sides_and_names_ranks_that_differ() -> None:
    bigger = dataclasses.replace(COSTS, sent=Counter({"pp send": 1024, "tp all-reduce": 5}))
    accounts = [
        Account(0, COSTS, COSTS, 1.0, 8.0, 0),
        Account(0, COSTS, bigger, 3.0, 10.0, 0),
        Account(1, COSTS, dataclasses.replace(COSTS, live=3.0), 0.0, 10.0, 123456),
        Account(1, COSTS, dataclasses.replace(COSTS, live=3.0), 0.0, 10.0, 123456),
    ]
    first, second = page(accounts, [0.25, 0.5]).split("stage 1, ranks 2-3\n")
    assert "stage 0, ranks 0-1\n" in first
    assert re.search(r"sent: pp send \(bytes\) +1,024 +1,024\n", first)
    assert re.search(r"idle +25\.0% +30\.0%\n", first)  # (1 + 2) / 10 and 3 / 10
    assert "other bytes on ranks 1\n" in first
    assert re.search(r"micro-batches kept at most +2\.5 +3\n", second)
    assert re.search(r"GPU memory allocated \(bytes\) +123,456\n", second)
    assert re.search(r"idle +50\.0% +0\.0%$", second)
    assert "other" not in second


def test_idle_time_is_not_made_up() -> None:
    assert re.search(r"idle +25\.0% +not measured$", page([Account(0, COSTS, COSTS, 0.0, 0.0, 0)], [0.25]))


def weighed(argv: list[str]) -> list[tuple[bool, bool]]:
    """Run on a rank: of each step whether it was weighed, and whether it was timed."""
    engine, found = start(argv), []
    engine.initialise()
    meter = Meter(engine)

    def inside(engine: Any, schedule: Any, progress: Any, *others: Any, **flags: Any) -> Any:
        costs, timed = meter.costs, meter.reduced_s
        with meter.step(progress):
            result = train_step(engine, schedule, progress, *others, **flags)
        found.append((meter.costs is not costs, meter.reduced_s > timed))
        return result

    harness.train_step = inside
    harness.steps(engine, fresh(engine), batches(STYLES["gpt2"], 4))
    return found


def test_the_first_step_is_weighed_and_the_others_are_timed() -> None:
    (found,) = run_ranks(weighed, 1, arguments(STYLES["gpt2"]))
    assert found == [(True, False), (False, True), (False, True), (False, True)]


def test_a_run_reports_what_was_predicted() -> None:
    outcome = run(
        [
            *arguments(STYLES["gpt2"]),
            "--train-iters",
            "3",
            "--lr-warmup-iters",
            "0",
            "--eval-iters",
            "0",
            "--report-costs",
        ]
    )
    assert outcome.code == 0, outcome.err
    rows = re.findall(r"^  (\w.*?) {2,}([\d,]+) +([\d,]+)$", outcome.out.split("costs of a step")[1], re.MULTILINE)
    assert len(rows) == 7
    for name, predicted, measured in rows:
        assert predicted == measured, name


def test_without_the_flag_there_is_no_report() -> None:
    outcome = run([*arguments(STYLES["gpt2"]), "--train-iters", "1", "--lr-warmup-iters", "0", "--eval-iters", "0"])
    assert outcome.code == 0, outcome.err
    assert "costs of a step" not in outcome.out
