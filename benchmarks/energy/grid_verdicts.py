"""What the scenes of the grid say to each bar: counts, the worst, and who broke it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Scenes = Mapping[str, Mapping[str, Any]]


def verdicts(scenes: Scenes) -> dict[str, Any]:
    """All bars over what is there."""
    plain = [one for one in scenes.values() if one["watts"] == 1.0]
    return {
        "scenes": len(scenes),
        "misses_against_edf": _edf(scenes),
        "joules_at_equal_or_fewer_misses": _dominated(
            [one for one in plain if one["world"] in ("cloud", "alone")]
        ),
        "ablation": _ablation(plain),
        "watts": _watts(scenes),
        "hot": _hot(plain),
        "battery": _battery(plain),
        "lte": _dominated([one for one in plain if one["world"] == "lte"]),
    }


def _where(one: Mapping[str, Any]) -> str:
    return f"{one['world']} {one['board']} {one['kind']} {one['load']:g}"


def _edf(scenes: Scenes) -> dict[str, Any]:
    """PACE misses no more than earliest deadline first."""
    more, sure = [], []
    for one in scenes.values():
        if "edf" not in one["pace_over"]:
            continue
        difference = one["pace_over"]["edf"]["missed_more"]
        if difference["ratio"] > 0:
            more.append(f"{_where(one)}: {100 * difference['ratio']:.2f} points more")
        if difference["low"] > 0:
            sure.append(_where(one))
    count = sum("edf" in one["pace_over"] for one in scenes.values())
    return {"scenes": count, "more_misses": more, "more_with_certainty": sure}


def _dominated(scenes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each other policy: where PACE is better in both, pays for fewer misses, or is worse."""
    found: dict[str, Any] = {}
    for one in scenes:
        for other, against in one["pace_over"].items():
            if other.startswith("pace-"):
                continue
            told = found.setdefault(f"{one['world']} {other}", _empty())
            ratio, more = against["cost"]["ratio"], against["missed_more"]["ratio"]
            told["cost"].append(ratio)
            told["missed_more"].append(more)
            if more <= 0 and ratio <= 1:
                told["fewer_of_both"] += 1
                told["cost_where_fewer"].append(ratio)
            elif more <= 0:
                told["fewer_misses_for_more_joules"].append(
                    f"{_where(one)}: {ratio:.2f} times the cost, {-100 * more:.1f} points fewer"
                )
            elif ratio <= 1:
                told["fewer_joules_for_more_misses"].append(
                    f"{_where(one)}: {ratio:.2f} times the cost, {100 * more:.1f} points more"
                )
            else:
                told["more_of_both"].append(
                    f"{_where(one)}: {ratio:.2f} times the cost, {100 * more:.1f} points more"
                )
    for told in found.values():
        there = told.pop("cost_where_fewer")
        told["median_cost_there"] = median(there) if there else None
        # Of all scenes, since the line above speaks only of those that PACE wins.
        told["cost_of_all"] = _spread(told.pop("cost"))
        told["missed_more_of_all"] = _spread(told.pop("missed_more"))
    return found


def _empty() -> dict[str, Any]:
    return {
        "fewer_of_both": 0,
        "cost": [],
        "missed_more": [],
        "cost_where_fewer": [],
        "fewer_misses_for_more_joules": [],
        "fewer_joules_for_more_misses": [],
        "more_of_both": [],
    }


def _ablation(scenes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What PACE costs over itself without a part, and how many more it misses: by part."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in scenes:
        for other, against in one["pace_over"].items():
            if other.startswith("pace-"):
                part = found.setdefault(other, {"cost": [], "missed": []})
                part["cost"].append(against["cost"]["ratio"])
                part["missed"].append(against["missed_more"]["ratio"])
    return {
        name: {
            "scenes": len(part["cost"]),
            "cost_over_without_it": _spread(part["cost"]),
            "missed_more_than_without_it": _spread(part["missed"]),
        }
        for name, part in found.items()
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": median(values), "most": max(values)}


def _watts(scenes: Scenes) -> dict[str, Any]:
    """PACE's advantage where the world's watts are others than it believes."""
    found = {}
    for watts in (0.7, 1.0, 1.3):
        some = [
            one["pace_over"]["edf"]
            for one in scenes.values()
            if one["watts"] == watts and one["world"] == "cloud" and one["load"] == 0.5
        ]
        if some:
            found[f"x{watts:g}"] = {
                "scenes": len(some),
                "cost_over_edf": _spread([one["cost"]["ratio"] for one in some]),
                "missed_more": _spread([one["missed_more"]["ratio"] for one in some]),
            }
    return found


def _hot(scenes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds above the limits at 50 degrees around the board, a run."""
    found: dict[str, Any] = {}
    for one in scenes:
        if one["world"] == "hot":
            found[_where(one)] = {
                row["policy"]: {"hard_s": row["hard_s"], "soft_s": row["soft_s"]}
                for row in one["rows"]
            }
    every = [one for one in scenes if one["rows"][0]["policy"] == "pace"]
    return {"pace_hard_s": sum(one["rows"][0]["hard_s"] for one in every), "scenes": found}


def _battery(scenes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seeds on which the battery lasted, of those on which any policy's did."""
    found: dict[str, Any] = {}
    for one in scenes:
        if one["world"] != "battery":
            continue
        lasted = one["lasted"]
        can = [any(of) for of in zip(*lasted.values(), strict=True)]
        found[f"{_where(one)} budget {one['budget']:g}"] = {
            "seeds_where_any_can": sum(can),
            **{
                name: sum(of and possible for of, possible in zip(each, can, strict=True))
                for name, each in lasted.items()
            },
        }
    return found
