"""A device on a board with a counter of joules, as its callers see it: answers and reasons."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from sensortrees import put_battery, put_rapl, put_zone
from services import Service, Services, run_tidegate, until
from wordmodel import write_word_checkpoint

from tidegate.api.openapi import document

pytestmark = pytest.mark.system

WATTS = 15.0
IDLE = 'tidegate_energy_joules_total{route="idle",scope="package",source="measured"} '


@dataclass(frozen=True, kw_only=True)
class Board:
    device: Service
    sysroot: Path


@contextmanager
def drawing(sysroot: Path) -> Iterator[None]:
    """The package's counter goes on as if it drew `WATTS`."""
    stop, began_s = threading.Event(), time.monotonic()
    counter = put_rapl(sysroot, 1000.0) / "energy_uj"

    def count() -> None:
        # In its place and as long as before, so that no reader finds it empty.
        with counter.open("r+", encoding="ascii") as file:
            while not stop.wait(0.01):
                file.seek(0)
                file.write(f"{1e6 * (1000 + WATTS * (time.monotonic() - began_s)):.0f}")
                file.flush()

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("energy")
    sysroot = folder / "root"
    put_zone(sysroot, 0, "x86_pkg_temp", 51.5)
    put_battery(sysroot)
    checkpoint = write_word_checkpoint(folder / "words", context=128)
    done = run_tidegate("convert", str(checkpoint), "--out", str(folder / "bundle"), "--quiet")
    assert done.returncode == 0, done.stderr
    flags = ("--profile", "generic-x86-64", "--energy-sysroot", str(sysroot))
    with drawing(sysroot), Services(folder) as services:
        device = services.serve(folder / "bundle", *flags)
        # What idling draws is known after a second: until then no request has a share above it.
        until(lambda: "energy" in answered(device), "an answer has joules", within_s=30)
        yield Board(device=device, sysroot=sysroot)


def answered(device: Service) -> dict[str, Any]:
    """The `tidegate` object of a short answer."""
    body = {"prompt": "hello", "max_tokens": 2, "tidegate": {"cache": False}}
    answer = httpx.post(f"{device.url}/v1/completions", json=body, timeout=10)
    told: dict[str, Any] = answer.json()["tidegate"]
    return told


def scraped(device: Service) -> str:
    return httpx.get(f"{device.url}/metrics", timeout=10).text


def test_the_official_client_gets_joules_of_the_package_that_were_measured(board: Board) -> None:
    client = openai.OpenAI(base_url=f"{board.device.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
    )
    assert answer.model_extra is not None
    energy: Any = answer.model_extra["tidegate"]["energy"]
    assert (energy["scope"], energy["source"]) == ("package", "measured")
    assert 0 <= energy["joules"] < 10 * WATTS


def test_chat_names_them_in_its_last_line(board: Board) -> None:
    told = run_tidegate("chat", "hello", "--url", board.device.url, "--max-tokens", "8")
    assert told.returncode == 0, told.stderr
    assert told.stderr.strip().endswith("J (package, measured)]")


def test_a_scrape_counts_joules_and_shows_watts_heat_and_battery(board: Board) -> None:
    text = scraped(board.device)
    assert IDLE in text
    assert "tidegate_board_celsius 51.5" in text
    assert "tidegate_battery_share 0.5" in text
    (watts,) = [
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("tidegate_power_watts{")
    ]
    assert watts == pytest.approx(WATTS, rel=0.5)


def test_an_explanation_is_what_the_document_says_and_what_the_command_shows(
    board: Board,
) -> None:
    told = httpx.post(
        f"{board.device.url}/route/explain",
        json={"prompt": "hello", "tidegate": {"deadline_ms": 5000}},
        timeout=10,
    )
    assert told.status_code == 200, told.text
    schema = {"$ref": "#/components/schemas/Explained", "components": document()["components"]}
    jsonschema_rs.validator_for(schema).validate(told.json())
    assert told.json()["route"] == "edge"
    assert told.json()["pace"]["terms"]["cloud_j"] is None
    shown = run_tidegate("route", "explain", "hello", "--url", board.device.url)
    assert shown.returncode == 0, shown.stderr
    for words in ("on the device: ", "power mode ", "counts as", "not set up", "battery share"):
        assert words in shown.stdout


def test_doctor_sees_the_same_board(board: Board) -> None:
    flags = ("--profile", "generic-x86-64", "--sysroot", str(board.sysroot))
    shown = run_tidegate("doctor", *flags)
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "joules measured: package" in text
    assert "temperature 51.5 C" in text
    assert "battery 50 %, discharging" in text
