"""The judges of the link's benchmarks: what they would have found, had it been there."""

from __future__ import annotations

import asyncio
import base64
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidegate.link.transport import Message

ledger: Any = import_module("link.ledger")
kills: Any = import_module("link.kills")
load: Any = import_module("link.load")
capture: Any = import_module("link.capture")
privacy: Any = import_module("link.privacy")


def entries(*said: tuple[str, int] | tuple[str, int, bool] | tuple[str, int, str]) -> list[Any]:
    """Ledger lines: what, which request, and `right` or `code`."""
    lines = []
    for what, number, *more in said:
        told = {"code" if isinstance(one, str) else "right": one for one in more}
        lines.append(ledger.Entry(what=what, number=number, t_s=0.0, **told))
    return lines


def test_every_request_counts_once_under_the_worst_that_is_true() -> None:
    found = ledger.tally(
        entries(
            *(("submitted", number) for number in range(7)),
            ("answered", 0),
            ("answered", 1),
            ("answered", 1),
            ("answered", 2, False),
            ("failed", 3, "over_capacity"),
            ("failed", 4, ledger.TIME_IS_UP),
            ("failed", 5, ledger.TIME_IS_UP),
            ("answered", 5),
            ("run", 0),
            ("run", 5),
            ("run", 5),
            ("repeated", 5),
        )
    )
    assert (found.submitted, found.answered_once) == (7, 2)
    assert (found.duplicated, found.wrong, found.failed) == (1, 1, 1)
    assert found.lost == 2, "one without any end, one for which only time was up"
    assert (found.ran_again, found.repeated_chunks) == (1, 1)


def test_a_ledger_is_read_in_whole_lines_and_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    reader = ledger.LedgerReader(path)
    assert list(reader.fresh()) == []
    ledger.Ledger(path).note("submitted", 1, request_id="ab")
    with path.open("ab") as file:
        file.write(b'{"what": "answ')
    assert [(one.what, one.request_id) for one in reader.fresh()] == [("submitted", "ab")]
    assert list(reader.fresh()) == []


def test_a_schedule_is_its_seeds_and_kills_everybody_in_time() -> None:
    planned = kills.schedule(1, 5000, 60)
    assert planned == kills.schedule(1, 5000, 60)
    assert planned != kills.schedule(2, 5000, 60)
    assert [one.after for one in planned] == sorted(one.after for one in planned)
    assert all(0 < one.after < 5000 for one in planned)
    assert {one.victim for one in planned} == {"broker", "gateway", "device"}


def test_an_answer_is_the_same_bytes_every_time() -> None:
    body = load.body_of(7, 24)
    assert load.number_of(body) == 7
    first = asyncio.run(load.expected_of(body))
    assert first == asyncio.run(load.expected_of(body))
    assert len(first) == 26
    assert first != asyncio.run(load.expected_of(load.body_of(8, 24)))


@pytest.mark.parametrize("before", [b"", b"x", b"xy", b"xyz"])
def test_a_secret_is_found_however_it_is_spelt(before: bytes) -> None:
    secret = {"the name": b"Andersson"}
    for spelt in (secret["the name"], secret["the name"].hex().encode()):
        assert capture.leaks([Message("t", before + spelt + b"!")], secret) == ["the name"]
    encoded = base64.b64encode(before + secret["the name"] + b"and more")
    assert capture.leaks([Message("t", encoded)], secret) == ["the name"]
    assert capture.leaks([Message("Andersson/t", b"")], secret) == ["the name"]
    assert capture.leaks([Message("t", b"Anders son")], secret) == []


def test_the_classifier_finds_what_is_there_and_nothing_where_nothing_is() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    noise = rng.normal(size=(300, 5))
    right, count = privacy.accuracy(noise, labels, 3, random.Random(0))
    low, high = privacy.wilson(right, count)
    assert low < 1 / 3 + 0.05
    assert high > 1 / 3 - 0.05
    right, count = privacy.accuracy(noise + 4 * labels[:, None], labels, 3, random.Random(0))
    assert right / count > 0.95


def test_an_interval_is_wilsons() -> None:
    low, high = privacy.wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=0.001), pytest.approx(0.943, abs=0.001))


def test_a_constant_rate_shows_one_size() -> None:
    rng = random.Random(1)
    peers = privacy.new_peers()
    keys = peers.open(peers.seal(b"prompt")[0])
    said = privacy.answer("code", 40, rng)
    sizes = {
        column: {one.size_bytes for one in privacy.observe(said, column, keys, rng)}
        for column in privacy.COLUMNS
    }
    assert len(sizes["constant"]) == 1
    assert len(sizes["off"]) > 5
