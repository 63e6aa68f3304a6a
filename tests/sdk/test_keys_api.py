"""`tidegate keys api add|list|revoke` and `tidegate usage export`, as commands."""

from __future__ import annotations

import csv
import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tidegate.cli.main import main
from tidegate.cloud.api_keys import ApiKeyStore
from tidegate.cloud.key_rules import Prices, Quota, Rate
from tidegate.cloud.usage import UsageBook, UsageRow


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(one) for one in arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_a_key_with_rules_is_shown_once_listed_without_it_and_revoked(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--requests", "60/minute/sliding", "--tokens", "90000/10s", "--expires", "90d")
    quotas = ("--quota-requests-day", 500, "--quota-tokens-month", 2_000_000)
    prices = ("--price-prompt", "0.25", "--price-cached", "0.025", "--price-completion", "1")
    scopes = ("--scope", "chat", "--scope", "models", "--model", "a")
    command = ("keys", "api", "add", state, "team", "--json")
    status, out, _ = told(capsys, *command, *limits, *quotas, *prices, *scopes)
    made = json.loads(out)
    assert status == 0
    assert made["expires_s"] - made["created_s"] == 90 * 86_400
    with closing(ApiKeyStore(state)) as store:
        found = store.find(made["key"])
        assert found is not None
        rules = found.rules
    assert (rules.scopes, rules.models) == (("chat", "models"), ("a",))
    assert rules.rates == (
        Rate(unit="requests", amount=60, window_s=60, strategy="sliding"),
        Rate(unit="tokens", amount=90_000, window_s=10),
    )
    assert rules.quotas == (
        Quota(unit="requests", period="day", amount=500),
        Quota(unit="tokens", period="month", amount=2_000_000),
    )
    assert rules.prices == Prices(prompt=250_000, completion=1_000_000, cached=25_000)
    for form in ((), ("--json",)):
        _, out, err = told(capsys, "keys", "api", "list", state, *form)
        assert made["id"] in out
        assert made["key"] not in out + err
    assert told(capsys, "keys", "api", "revoke", state, "team")[0] == 0
    assert "  revoked  " in told(capsys, "keys", "api", "list", state)[1]


def test_without_json_the_key_alone_is_on_stdout(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, err = told(capsys, "keys", "api", "add", state, "team")
    with closing(ApiKeyStore(state)) as store:
        assert store.find(out.strip()) is not None
    assert out.strip() not in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--requests", "many"), "requests = 'many': must be AMOUNT/"),
        (("--requests", "0/minute"), "requests = '0/60s': must be at least 1"),
        (("--tokens", "9/second/log"), "tokens = 'log': must be by bucket, fixed or sliding"),
        (("--requests", "9/second/leaky"), "requests = 'leaky': must be by"),
        (("--scope", "all"), "scope = 'all': must be one of chat"),
        (("--price-prompt", "0.0000001"), "price-prompt = '0.0000001': must be a price"),
        (("--price-prompt", "-1"), "price-prompt = '-1': must be a price"),
        (("--price-prompt", "nan"), "price-prompt = 'nan': must be a price"),
        (("--expires", "soon"), "expires = 'soon': must be a number"),
        (("--expires", "0d"), "must be in the future"),
        (("--quota-tokens-day", "0"), "tokens per day = 0: must be at least 1"),
    ],
)
def test_rules_that_make_no_sense_are_one_line_that_says_so(
    state: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    pair = [f"{flags[0]}={flags[1]}"]
    status, out, err = told(capsys, "keys", "api", "add", state, "team", *pair)
    assert (status, out) == (1, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_name_is_free_again_once_its_key_is_revoked(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, "keys", "api", "add", state, "team")[0] == 0
    assert "one that no other key has" in told(capsys, "keys", "api", "add", state, "team")[2]
    assert told(capsys, "keys", "api", "revoke", state, "team")[0] == 0
    assert told(capsys, "keys", "api", "add", state, "team")[0] == 0
    assert "not revoked" in told(capsys, "keys", "api", "revoke", state, "nobody")[2]


def test_listing_an_empty_folder_makes_no_store_there(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, "keys", "api", "list", state)[0] == 1
    assert told(capsys, "usage", "export", state)[0] == 1
    assert not state.exists()


def row(number: int, began_s: float, **changed: Any) -> UsageRow:
    facts: dict[str, Any] = {
        "id": f"{number:04}",
        "key_id": "key-1",
        "key_name": "team",
        "request_id": "r",
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "began_s": began_s,
        "ended_s": began_s + 1,
        "status": 200,
        "outcome": "ok",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "cost_nano": 1_500_000_007,
    }
    return UsageRow(**facts | changed)


def test_usage_is_exported_by_day_each_call_once(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    day_s = 1_700_006_400.0  # 2023-11-15T00:00Z
    with closing(UsageBook(state)) as book:
        for number, at_s in enumerate(
            (day_s - 0.001, day_s, day_s, day_s + 86_399, day_s + 86_400)
        ):
            book.add(row(number, at_s))
        book.flush()
        book.add(row(1, day_s))  # written before; the answer of that write was lost
    days = ("--from", "2023-11-15", "--to", "2023-11-16")
    _, out, _ = told(capsys, "usage", "export", state, *days)
    found = list(csv.DictReader(io.StringIO(out)))
    assert [one["id"] for one in found] == ["0001", "0002", "0003"]
    assert {one["cost"] for one in found} == {"1.500000007"}
    _, out, _ = told(capsys, "usage", "export", state, *days, "--format", "jsonl")
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["0001", "0002", "0003"]
    assert told(capsys, "usage", "export", state, "--from", "yesterday")[0] == 1


def test_an_export_of_many_calls_at_the_same_instant_has_each_once(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(UsageBook(state)) as book:
        for number in range(2500):
            book.add(row(number, 5.0))
    lines = told(capsys, "usage", "export", state, "--format", "jsonl")[1].splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 2500
