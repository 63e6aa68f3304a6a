"""`tidegate simulate`: what it prints, what it draws, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tidegate.cli.main import main

FEW = [
    "simulate", "--profile", "jetson-orin-nano-8gb-super", "--seeds", "2", "--requests", "40",
]  # fmt: skip


def test_the_table_names_every_policy_what_is_assumed_and_how_it_compares(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*FEW, "--policy", "pace,edf,cloud"]) == 0
    printed = capsys.readouterr().out
    assert "assumed: idle below MAXN_SUPER" in printed
    assert "watts of the module, estimated" in printed
    for name in ("pace", "edf", "cloud"):
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    assert re.search(r"^edf .*\[\d\.\d\d, \d\.\d\d\]", printed, re.MULTILINE)


def test_json_holds_the_scene_and_repeats_by_its_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for _ in range(2):
        assert main([*FEW, "--policy", "pace,bound", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    pace, bound = results[0]["rows"]
    assert bound["system_j"] <= pace["system_j"] + pace["price"]
    assert results[0]["scene"]["assumed"]["why"]
    assert results[0]["scene"]["costs"]["modes"][0]["name"] == "7W"


def test_a_trace_is_read_and_each_seed_takes_a_stretch_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:{n // 6:02}:{n % 6 * 10:02}.0000000,{50 + n},20" for n in range(60)]
    rows.append("2023-11-16 19:00:00.0000000,9999,20")
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(rows))
    assert main([*FEW, "--trace", str(trace), "--policy", "local", "--json"]) == 0
    capsys.readouterr()
    assert main([*FEW[:-1], "61", "--trace", str(trace), "--policy", "local"]) == 1
    assert "at most the 60 of the trace" in capsys.readouterr().err


def test_a_day_may_stay_a_day(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--profile", "raspberry-pi-5", "--trace", "home", "--as-recorded"]
    assert main([*words, "--seeds", "1", "--requests", "20", "--policy", "pace"]) == 0
    assert "20 requests at the times of the trace" in capsys.readouterr().out


def test_a_battery_is_one_more_column_and_the_page_has_its_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["simulate", "--profile", "ryzen-laptop", "--trace", "home", "--battery"]
    words += ["--seeds", "1", "--requests", "20", "--policy", "pace,battery", "--plot", str(page)]
    assert main(words) == 0
    capsys.readouterr()
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "http" not in re.sub(r"base64,[^\"]*", "", text), "a page of its own, that asks nobody"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policy", "fastest"], "policy = 'fastest'"),
        (["--seeds", "0"], "seeds = 0"),
        (["--utilisation", "0"], "utilisation = 0.0"),
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--battery"], "a board that has one"),
        (["--profile", "jetson-agx-thor"], "to be simulated"),
        (["--plot", "page.pdf"], "ends in .html"),
        (["--requests", "1"], "two at different times"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FEW, *words]) == 1
    assert told in capsys.readouterr().err
