"""What a scrape says of a device's energy."""

from __future__ import annotations

from dataclasses import replace

from energyviews import bare_view, full_view
from prometheus_client.parser import text_string_to_metric_families

from tidegate.edge.energy.governor_view import EnergyView
from tidegate.edge.energy.metrics import render_energy


def samples(view: EnergyView) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = render_energy(view).decode()
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def plain(view: EnergyView) -> dict[str, float]:
    return {name: value for (name, labels), value in samples(view).items() if not labels}


def test_joules_are_counted_by_scope_source_and_route() -> None:
    joules = {
        dict(labels)["route"]: (dict(labels)["scope"], dict(labels)["source"], value)
        for (name, labels), value in samples(full_view()).items()
        if name == "tidegate_energy_joules_total"
    }
    assert joules == {
        "edge": ("module", "measured", 321.5),
        "idle": ("module", "measured", 4000.25),
        "cloud": ("radio", "estimated", 2.5),
    }


def test_exactly_one_power_mode_is_in_use() -> None:
    modes = {
        dict(labels)["mode"]: value
        for (name, labels), value in samples(full_view()).items()
        if name == "tidegate_power_mode"
    }
    assert modes == {"7W": 0, "15W": 1, "25W": 0}


def test_the_state_of_board_battery_and_scheduler_is_told() -> None:
    found = plain(full_view())
    assert found == {
        "tidegate_energy_debt_joules": 120.5,
        "tidegate_power_mode_switches_total": 7,
        "tidegate_power_mode_failed_switches_total": 1,
        "tidegate_board_celsius": 61.5,
        "tidegate_battery_share": 0.42,
        "tidegate_battery_plugged": 0,
        "tidegate_sensor_faults": 1,
        "tidegate_energy_held_requests": 3,
        "tidegate_energy_quiet": 1,
        "tidegate_energy_decisions_total": 1234,
        "tidegate_energy_deferred_total": 11,
        "tidegate_energy_failures_total": 2,
    }
    labelled = {key: value for key, value in samples(full_view()).items() if key[1]}
    scope = (("scope", "module"), ("source", "measured"))
    assert labelled[("tidegate_power_watts", scope)] == 9.25
    assert labelled[("tidegate_power_rail_watts", (("rail", "VDD_CPU_GPU_CV"),))] == 5.5
    assert labelled[("tidegate_board_limit_celsius", (("limit", "soft"),))] == 70
    assert labelled[("tidegate_board_limit_celsius", (("limit", "hard"),))] == 95


def test_a_prediction_of_which_too_few_were_seen_has_no_error() -> None:
    errors = {
        dict(labels)["predicted"]: value
        for (name, labels), value in samples(full_view()).items()
        if name == "tidegate_energy_prediction_error"
    }
    assert errors == {"step": 0.04}


def test_what_decisions_took_is_told_in_seconds() -> None:
    took = {
        dict(labels)["statistic"]: value
        for (name, labels), value in samples(full_view()).items()
        if name == "tidegate_energy_decision_seconds"
    }
    assert took == {"median": 40 / 1e6, "p99": 150 / 1e6}


def test_what_nobody_measures_is_absent_and_not_zero() -> None:
    found = {name for name, _ in samples(bare_view())}
    for absent in (
        "energy_joules_total",
        "power_watts",
        "power_rail_watts",
        "board_celsius",
        "board_limit_celsius",
        "battery_share",
        "battery_plugged",
        "energy_prediction_error",
        "energy_decision_seconds",
    ):
        assert f"tidegate_{absent}" not in found
    assert plain(bare_view())["tidegate_sensor_faults"] == 0


def test_watts_come_with_a_scope_or_not_at_all() -> None:
    found = {name for name, _ in samples(replace(full_view(), scope=None))}
    assert "tidegate_power_watts" not in found


def test_a_label_with_quotes_and_newlines_stays_one_line() -> None:
    view = replace(full_view(), rails={'odd "rail"\n\\': 1.0})
    assert (("tidegate_power_rail_watts", (("rail", 'odd "rail"\n\\'),))) in samples(view)
