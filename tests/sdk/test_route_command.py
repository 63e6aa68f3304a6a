"""`tidegate route explain` and the client's `explain`, against a device that chooses by length."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from echobackend import EchoBackend
from explainingbackend import ExplainingEcho
from loopback import serving

from tidegate.api.http import create_app
from tidegate.api.schema import Options
from tidegate.cli.main import main
from tidegate.cli.route import _print
from tidegate.client import AsyncClient, Client, Explanation, RequestError, UnavailableError
from tidegate.client.explanations import read_explanation
from tidegate.engine.request import Priority


@contextmanager
def device(backend: EchoBackend) -> Iterator[str]:
    with serving(create_app(backend)) as server:
        yield server.url


def printed(capsys: pytest.CaptureFixture[str], backend: EchoBackend, *flags: str) -> str:
    with device(backend) as url:
        assert main(["route", "explain", "hello", "--url", url, *flags]) == 0
    return capsys.readouterr().out


def cells(text: str, title: str) -> list[str]:
    """The words of a table's row."""
    (row,) = [line.split() for line in text.splitlines() if line.split()[:1] == title.split()[:1]]
    return row[len(title.split()) :]


def test_both_ways_are_shown_beside_each_other_with_mode_and_state(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, ExplainingEcho())
    lines = text.splitlines()
    assert lines[0] == "on the device: 5 characters, 40 fit"
    assert lines[1] == "power mode 15W: the knee is in time"
    assert cells(text, "predicted") == ["0.50", "s", "0.75", "s"]
    assert cells(text, "late by, 9 of 10") == ["0.50", "s", "0.00", "s"]
    assert cells(text, "counts as") == ["250", "mJ", "2.50", "J"]
    for row in (
        ("weights energy", "1"),
        ("weights late j per s", "50"),
        ("battery debt j", "120.5"),
        ("heat celsius", "61.5"),
        ("heat hard c", "-"),
        ("quiet", "no"),
        ("faults", "ina3221: permission denied"),
    ):
        assert any(line.split() == " ".join(row).split() for line in lines), row


def test_a_way_that_is_closed_is_called_so_and_by_what(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, ExplainingEcho(), "--privacy", "local")
    assert cells(text, "counts as")[-1] == "closed"
    assert cells(text, "edge") == ["open"]
    assert "private (local): never leaves the device" in text


def test_without_a_profile_the_clock_alone_is_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, ExplainingEcho(has_pace=False))
    assert "power mode" not in text
    assert "counts as" not in text
    assert "the clock alone decides: the device serves without a profile" in text


def test_joules_that_nobody_can_know_are_said_to_be_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = "watts of this board are unknown"
    assert told in printed(capsys, ExplainingEcho(costs="estimated, unknown"))
    assert told not in printed(capsys, ExplainingEcho())


def test_json_is_what_the_device_told(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(printed(capsys, ExplainingEcho(), "--json"))
    assert told["route"] == "edge"
    assert told["pace"]["terms"]["local_j"] == 0.25


def test_every_wish_reaches_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    backend = ExplainingEcho()
    flags = "--privacy local --route edge --priority background --deadline-ms 700 --max-tokens 9"
    printed(capsys, backend, *flags.split())
    (call,) = backend.explained
    assert call.options == Options(
        route="edge", privacy="local", priority=Priority.BACKGROUND, deadline_ms=700
    )
    assert call.sampling.max_tokens == 9
    assert backend.calls == []


def test_a_service_without_a_choice_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with device(EchoBackend()) as url:
        assert main(["route", "explain", "hello", "--url", url]) != 0
    told = capsys.readouterr().err
    assert url in told
    assert "no choice of routes" in told


def test_both_clients_explain() -> None:
    async def awaited(url: str) -> Explanation:
        async with AsyncClient(url) as client:
            return await client.explain("hello", privacy="local")

    with device(ExplainingEcho()) as url:
        with Client(url) as client:
            one = client.explain("hello", privacy="local")
        assert asyncio.run(awaited(url)) == one
    assert one.route == "edge"
    assert one.edge_s == 0.5
    assert one.cloud_s is None
    assert one.pace is not None
    assert one.pace.local_j == 0.25
    assert one.pace.cloud_j is None
    assert one.pace.late_local_s == 0.5


def test_a_wrong_option_is_refused_before_it_is_sent() -> None:
    with (
        Client("http://127.0.0.1:9", timeout_s=1) as client,
        pytest.raises(RequestError, match="deadline_ms"),
    ):
        client.explain("hello", deadline_ms=-1)


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"route": "edge", "reason": "x", "clock": {}, "pace": None},
        {"route": 1, "reason": "x", "clock": {}, "pace": None, "state": {}},
        {"route": "edge", "reason": "x", "clock": {}, "pace": 7, "state": {}},
        {"route": "edge", "reason": "x", "clock": {}, "pace": {"mode": 1}, "state": {}},
    ],
)
def test_what_is_no_explanation_is_nothing_that_a_device_said(body: object) -> None:
    with pytest.raises(UnavailableError, match="no Tidegate device"):
        read_explanation(body)


def explained(reason: str = "x", **terms: object) -> dict[str, object]:
    """What a device may tell."""
    return {
        "route": "[/bold]",
        "reason": reason,
        "filters": {"edge": "[red]", "cloud": None},
        "clock": {"edge_s": 10**400, "cloud_s": math.nan},
        "pace": {"mode": "[/]", "reason": "[b]", "mode_reason": "[/i]", "terms": terms},
        "state": {"costs": "estimated, unknown", "mode_reason": "of the mode until now"},
    }


def test_numbers_that_no_computer_can_count_with_are_unknown() -> None:
    found = read_explanation(explained(local_j=-(10**400), cloud_j=math.inf, late_local_s=2))
    assert (found.edge_s, found.cloud_s) == (None, None)
    assert found.pace is not None
    assert (found.pace.local_j, found.pace.cloud_j) == (None, None)
    assert found.pace.late_local_s == 2.0


def test_words_of_a_device_are_shown_and_never_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    _print(read_explanation(explained("[/bold] [link=x]")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[/bold]: [/bold] [link=x]"
    assert lines[1] == "power mode [/]: [/i]"
    assert any("[red]" in line for line in lines)


def test_watts_that_nobody_knows_close_no_way(capsys: pytest.CaptureFixture[str]) -> None:
    _print(read_explanation(explained()))
    assert cells(capsys.readouterr().out, "counts as") == ["unknown", "closed"]
