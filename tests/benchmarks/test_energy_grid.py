"""What is said of the grid of scenes: medians over all of them, and one setting to a file."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tidegate.errors import ConfigError

grid: Any = import_module("energy.grid")
verdicts: Any = import_module("energy.grid_verdicts")
SETTINGS = {"seeds": 20, "requests": 80, "traces": True}


def scene(name: str, cost: float, missed_more: float) -> dict[str, Any]:
    return {
        "world": "alone",
        "board": name,
        "kind": "conv",
        "load": 0.5,
        "watts": 1.0,
        "rows": [{"policy": "pace", "hard_s": 0.0}],
        "pace_over": {
            "edf": {"cost": {"ratio": cost}, "missed_more": {"ratio": missed_more, "low": -1.0}}
        },
    }


def test_medians_are_told_of_all_scenes_and_not_only_of_those_that_pace_wins() -> None:
    scenes = {
        name: scene(name, cost, missed)
        for name, cost, missed in (
            ("a", 0.5, -0.1),
            ("b", 0.7, 0.0),
            ("c", 1.2, -0.2),
            ("d", 1.4, -0.3),
        )
    }
    told = verdicts.verdicts(scenes)["joules_at_equal_or_fewer_misses"]["alone edf"]
    assert told["fewer_of_both"] == 2
    assert told["median_cost_there"] == pytest.approx(0.6)
    assert told["cost_of_all"] == pytest.approx({"least": 0.5, "median": 0.95, "most": 1.4})
    assert told["missed_more_of_all"]["median"] == pytest.approx(-0.15)


def test_what_is_kept_is_judged_as_it_is_now() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "energy-grid.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert results["verdicts"] == grid.clean(verdicts.verdicts(results["scenes"]))


@pytest.mark.parametrize("other", [{"seeds": 2}, {"requests": 8}, {"traces": False}])
def test_a_run_goes_on_only_with_the_settings_that_it_began_with(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    path = tmp_path / "grid.json"
    assert grid.kept(path, SETTINGS) == {}
    scenes = {"one": scene("a", 0.5, 0.0)}
    grid.keep(path, scenes, SETTINGS)
    assert grid.kept(path, SETTINGS) == scenes
    assert grid.kept(path, None) == scenes, "who only judges needs none"
    with pytest.raises(ConfigError, match=r"grid\.json"):
        grid.kept(path, SETTINGS | other)
