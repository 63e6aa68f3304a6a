"""The board is one that Grafana takes: ids, places and references fit, and names are the page's."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cloud" / "deploy" / "grafana"
BOARD = json.loads((FOLDER / "board.json").read_text(encoding="utf-8"))
ALERTS = (FOLDER / "alerts.yml").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
PANELS: list[dict[str, Any]] = BOARD["panels"]
CHARTS = [panel for panel in PANELS if panel["type"] != "row"]
NAMED = set(re.findall(r"`((?:tidegate|process)_[a-z0-9_]+)", PAGE))


def expressions() -> list[str]:
    return [target["expr"] for panel in CHARTS for target in panel["targets"]]


def metrics_of(text: str) -> set[str]:
    """The families that an expression reads."""
    found = re.findall(r"\b((?:tidegate|process)_[a-z0-9_]+)\b", text)
    known = {name if name in NAMED else re.sub(r"_(bucket|sum|count)$", "", name) for name in found}
    return known - {"tidegate_request_success", "tidegate"}


def test_panels_have_ids_of_their_own_and_overlap_nowhere() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["h"] > 0 for at in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_every_panel_says_what_it_shows_and_asks_the_chosen_source() -> None:
    assert {panel["type"] for panel in CHARTS} == {"timeseries", "stat"}
    for panel in CHARTS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert references == [chr(ord("A") + place) for place in range(len(references))]
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)


def test_variables_are_defined_before_they_are_used() -> None:
    defined = ["__rate_interval"]
    for variable in BOARD["templating"]["list"]:
        query = variable["query"] if variable["type"] == "query" else {"query": ""}
        assert set(re.findall(r"\$(\w+)", query["query"])) <= set(defined)
        defined.append(variable["name"])
    used = {name for text in expressions() for name in re.findall(r"\$(\w+)", text)}
    assert used == set(defined) - {"datasource"}


@pytest.mark.parametrize("text", [*expressions(), ALERTS])
def test_a_query_reads_metrics_of_the_page(text: str) -> None:
    assert metrics_of(text) <= NAMED
    assert metrics_of(text)


def test_the_board_shows_every_subject_that_an_operator_asks_for() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == [
        "Now",
        "Latency",
        "Throughput",
        "Queue",
        "KV and prefix cache",
        "Models and encoders",
        "Errors",
        "API keys",
        "Link to devices",
        "Energy of devices",
        "Processes",
    ]
