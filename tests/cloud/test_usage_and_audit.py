"""Costs, rows that are written once, audit files that rotate and go, and logs as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyedapp import Clock, keyed, keyed_access

from tidegate.cli.main import main
from tidegate.cloud.access_settings import AccessSettings
from tidegate.cloud.audit import MOST_WAITING, AuditLog, AuditSettings
from tidegate.cloud.key_rules import Prices, Rate, parse_price, parse_rate
from tidegate.cloud.limits_of_keys import duration
from tidegate.cloud.price_table import PriceTable, read_prices
from tidegate.cloud.usage import DAY_S, FILE, LEAST_DAYS, UsageBook, UsageRow, exported
from tidegate.errors import CapacityError, ConfigError

MICRO = st.integers(0, 10**9)
TOKENS = st.integers(0, 10**6)


def row(number: int, **changed: Any) -> UsageRow:
    facts: dict[str, Any] = {
        "id": f"{number:05}",
        "key_id": "key-1",
        "key_name": "team",
        "request_id": "r",
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "began_s": 1_700_000_000.0,
        "ended_s": 1_700_000_001.0,
        "status": 200,
        "outcome": "ok",
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "completion_tokens": 5,
        "cost_nano": 0,
    }
    return UsageRow(**facts | changed)


@given(MICRO, MICRO, st.none() | MICRO, TOKENS, TOKENS, TOKENS)
def test_a_cost_is_exact(
    prompt: int, completion: int, cached: int | None, fresh: int, found: int, said: int
) -> None:
    prices = Prices(prompt=prompt, completion=completion, cached=cached)
    nano = prices.cost_nano(
        prompt_tokens=fresh + found, cached_tokens=found, completion_tokens=said
    )
    per_1000 = Decimal("0.000001")
    cached_price = prompt if cached is None else cached
    expected = (fresh * prompt + found * cached_price + said * completion) * per_1000 / 1000
    assert Decimal(str(exported(row(0, cost_nano=nano))["cost"])) == expected


@given(MICRO)
def test_a_price_is_read_as_it_is_written(micro: int) -> None:
    assert parse_price("p", f"{micro // 10**6}.{micro % 10**6:06}") == micro


@given(st.integers(1, 10**9), st.sampled_from(["second", "minute", "hour", "day", "7s", "90s"]))
def test_a_rate_is_read_as_it_is_shown(amount: int, span: str) -> None:
    rate = parse_rate("requests", f"{amount}/{span}/sliding")
    assert parse_rate("requests", str(rate)) == rate
    assert rate == Rate(unit="requests", amount=amount, window_s=rate.window_s, strategy="sliding")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (86_399, "23h59m59s")],
)
def test_durations_are_told_as_openai_tells_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rows_wait_for_a_disk_that_takes_none_and_are_written_once(tmp_path: Path) -> None:
    with closing(UsageBook(tmp_path)) as book:
        with sqlite3.connect(tmp_path / FILE) as other:
            other.execute("BEGIN IMMEDIATE")
            book._db._db.execute("PRAGMA busy_timeout = 10")
            book.add(row(1))
            with pytest.raises(CapacityError):
                book.flush()
            assert book.waiting == 1
            other.execute("ROLLBACK")
        other.close()
        book.add(row(2))
        book.flush()
        book.add(row(2))  # the write went through, its answer did not
        book.flush()
        assert [one.id for one in book.rows(0, 1e12)] == ["00001", "00002"]
        assert (book.since("key-1", 0).requests, book.since("key-1", 0).tokens) == (2, 30)


def test_old_rows_go_by_whole_days_and_the_rest_stays_exact(tmp_path: Path) -> None:
    with closing(UsageBook(tmp_path)) as book:
        assert book.pruned_before_s == 0
        for day in range(40):
            for hour in (0, 23):
                began_s = day * DAY_S + hour * 3600.0
                book.add(row(day * 100 + hour, began_s=began_s, ended_s=began_s + 1))
        book.flush()
        assert book.prune(35.9 * DAY_S) == 70
        assert book.pruned_before_s == 35 * DAY_S
        left = [one.began_s for one in book.rows(0, 1e12)]
        assert left == [day * DAY_S + hour * 3600.0 for day in range(35, 40) for hour in (0, 23)]
        assert book.since("key-1", 0).requests == 10
        assert book.prune(35.9 * DAY_S) == 0
        assert book.prune(1.0) == 0  # a clock that went back deletes nothing and says nothing new
        assert book.pruned_before_s == 35 * DAY_S


def test_more_rows_than_one_transaction_takes_are_deleted(tmp_path: Path) -> None:
    with closing(UsageBook(tmp_path)) as book:
        for number in range(4500):
            book.add(row(number, began_s=float(number)))
        book.flush()
        assert book.prune(4 * DAY_S) == 4500
        assert list(book.rows(0, 1e12)) == []


def test_a_book_of_an_earlier_release_is_taken_over_with_its_rows(tmp_path: Path) -> None:
    with closing(UsageBook(tmp_path)) as book:
        book.add(row(1))
    with closing(sqlite3.connect(tmp_path / FILE)) as old, old:
        old.execute("DROP TABLE pruned")
        old.execute("PRAGMA user_version = 1")
    with closing(UsageBook(tmp_path)) as book:
        assert [one.id for one in book.rows(0, 1e12)] == ["00001"]
        assert book.pruned_before_s == 0


def test_rows_of_a_months_quotas_cannot_be_pruned(tmp_path: Path) -> None:
    assert LEAST_DAYS > 31
    with pytest.raises(ConfigError, match="usage-days = 31: must be at least 32, or 0"):
        AccessSettings(state=tmp_path, usage_days=31)


def test_a_service_prunes_as_it_writes(tmp_path: Path) -> None:
    clock = Clock()

    async def run() -> list[str]:
        access = keyed_access(tmp_path, clock=clock, usage_days=40)
        access.usage.add(row(1, began_s=clock.now_s - 50 * DAY_S))
        access.usage.add(row(2, began_s=clock.now_s - 30 * DAY_S))
        await access.flush()
        left = [one.id for one in access.usage.rows(0, 1e12)]
        clock.now_s += 20 * DAY_S
        await access.flush()
        assert list(access.usage.rows(0, 1e12)) == []
        await access.close()
        return left

    assert asyncio.run(run()) == ["00002"]


PRICES = """
[models.m]
prompt = "0.5"
cached = "0.05"
completion = "2"

[models."*"]
completion = "1"
"""


def test_a_model_has_its_price_and_a_keys_own_goes_first(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    table = read_prices(path)
    assert table.of("m", Prices()) == Prices(prompt=500_000, cached=50_000, completion=2_000_000)
    assert table.of("other", Prices()) == Prices(completion=1_000_000)
    own = Prices(prompt=1)
    assert table.of("m", own) == own
    assert PriceTable().of("m", Prices()) == Prices()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x", "a TOML file of prices"),
        ("[model.m]", r"tables \[models.NAME\]"),
        ("[models.m]\nprice = '1'", "prices of m"),
        ("[models.m]\nprompt = 0.1", "a price as a string"),
        ("[models.m]\nprompt = '-1'", "a price per 1000 tokens"),
        ("[models]\nm = 1", "prices of m"),
    ],
)
def test_a_table_of_prices_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_prices(path)


def test_calls_cost_what_their_model_does(tmp_path: Path) -> None:
    prices = PriceTable(models={"echo-1": Prices(prompt=10, completion=1000)})

    async def run() -> None:
        async with keyed(tmp_path, prices=prices) as app:
            _, plain = app.add("plain")
            _, priced = app.add("priced", prices=Prices(completion=7))
            for key in (plain, priced):
                assert (await app.chat(key)).status_code == 200

    asyncio.run(run())
    with closing(UsageBook(tmp_path)) as book:
        costs = {one.key_name: one.cost_nano for one in book.rows(0, 1e12)}
    assert costs == {"plain": 3 * 10 + 3 * 1000, "priced": 3 * 7}


def test_an_export_says_what_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(UsageBook(tmp_path)) as book:
        book.add(row(1, began_s=10 * DAY_S))
        book.flush()
        book.prune(11 * DAY_S)
        book.add(row(2, began_s=20 * DAY_S))
    assert main(["usage", "export", str(tmp_path), "--format", "jsonl"]) == 0
    told = capsys.readouterr()
    assert [json.loads(line)["id"] for line in told.out.splitlines()] == ["00002"]
    assert told.err == "tidegate usage: calls before 1970-01-12 were deleted\n"
    assert main(["usage", "export", str(tmp_path), "--from", "1970-01-12"]) == 0
    assert capsys.readouterr().err == ""


def lines_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of every file, the oldest first."""
    files = [*sorted(folder.glob("audit-*.jsonl")), folder / "audit.jsonl"]
    return [[json.loads(line) for line in one.read_text().splitlines()] for one in files]


def test_a_full_audit_file_is_followed_by_another_and_old_ones_go_by_bytes(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, AuditSettings(file_bytes=1000, keep_bytes=3000))
    for number in range(40):
        log.add({"number": number, "filler": "x" * 150})
        log.flush()
    numbers = [line["number"] for file in lines_of(tmp_path) for line in file]
    assert numbers == list(range(numbers[0], 40))
    sizes = [one.stat().st_size for one in tmp_path.glob("audit-*.jsonl")]
    assert 0 < sum(sizes) <= 3000
    assert max(sizes) < 1000 + 200
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_no_audit_file_has_two_days_and_old_days_go(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, AuditSettings(keep_days=2))
    day_s = 86_400.0
    for day in range(5):
        now_s = 1_700_006_400.0 + day * day_s
        log.add({"day": day})
        log.flush(now_s=now_s)
        os.utime(tmp_path / "audit.jsonl", (now_s, now_s))
    assert lines_of(tmp_path) == [[{"day": 2}], [{"day": 3}], [{"day": 4}]]
    log.flush(now_s=now_s + 3 * day_s)  # nothing new: what is old goes all the same
    assert lines_of(tmp_path) == [[{"day": 4}]]


def test_two_processes_share_an_audit_folder(tmp_path: Path) -> None:
    logs = [AuditLog(tmp_path, AuditSettings(file_bytes=500)) for _ in range(2)]
    for number in range(60):
        logs[number % 2].add({"number": number})
        logs[number % 2].flush()
    assert [line["number"] for file in lines_of(tmp_path) for line in file] == list(range(60))


def test_audit_lines_that_find_no_room_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(tmp_path, AuditSettings())
    (tmp_path / "audit.jsonl").mkdir()  # nothing can be appended to it
    for number in range(MOST_WAITING + 5):
        log.add({"number": number})
    log.flush()
    assert "cannot be written" in caplog.text
    (tmp_path / "audit.jsonl").rmdir()
    log.flush()
    (lines,) = lines_of(tmp_path)
    assert len(lines) == MOST_WAITING + 1
    assert lines[-1] == {"event": "dropped", "lines": 5}


@pytest.mark.parametrize("name", ["file_bytes", "keep_days", "keep_bytes"])
def test_a_retention_of_nothing_is_refused_by_name(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=name):
        AuditSettings(**settings)
