"""Prometheus text of a device's energy, made from its view when somebody asks.

What nobody knows is absent, never 0. Joules are counted by scope, source and route, and are not to
be summed across the first two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from tidegate.api.engine_metrics import render
from tidegate.edge.energy.governor_view import EnergyView


def render_energy(now: EnergyView) -> bytes:
    """Prometheus text exposition, for `Backend.metrics`."""
    return render([*_joules(now), *_power(now), *_board(now), *_scheduling(now)])


def _joules(now: EnergyView) -> Iterable[Metric]:
    joules = CounterMetricFamily(
        "tidegate_energy_joules",
        "Joules, of answers above idling and of idling, by what they cover and how they are known.",
        labels=("scope", "source", "route"),
    )
    for labels, value in sorted(now.totals.items()):
        joules.add_metric(labels, value)
    yield joules
    yield _gauge("energy_debt_joules", "Joules drawn beyond the battery's plan.", now.debt_j)


def _power(now: EnergyView) -> Iterable[Metric]:
    modes = {name: float(name == now.mode) for name in now.modes}
    yield _by("power_mode", "1 for the power mode that is in use.", "mode", modes)
    watts = GaugeMetricFamily(
        "tidegate_power_watts",
        "Mean watts of the last second or so.",
        labels=("scope", "source"),
    )
    if now.watts is not None and now.scope is not None and now.source is not None:
        watts.add_metric((now.scope, now.source), now.watts)
    yield watts
    yield _by("power_rail_watts", "Watts of what is measured besides.", "rail", now.rails)
    yield _counter("power_mode_switches", "Power modes that were taken.", now.switches)
    yield _counter(
        "power_mode_failed_switches",
        "Power modes that were refused or did not hold.",
        now.failed_switches,
    )


def _board(now: EnergyView) -> Iterable[Metric]:
    yield _gauge("board_celsius", "Of the zone that is nearest to its limit.", now.celsius)
    limits = {"soft": now.soft_c, "hard": now.hard_c}
    known = {name: value for name, value in limits.items() if value is not None}
    yield _by("board_limit_celsius", "Limits of that zone.", "limit", known)
    share = plugged = None
    if now.battery is not None:
        share, plugged = now.battery.share, float(now.battery.plugged)
    yield _gauge("battery_share", "Of a full battery, 1 is all.", share)
    yield _gauge("battery_plugged", "1 while power comes from outside.", plugged)
    yield _gauge("sensor_faults", "What should be readable and is not.", len(now.faults))


def _scheduling(now: EnergyView) -> Iterable[Metric]:
    yield _gauge("energy_held_requests", "Requests that wait for their place.", now.held)
    yield _gauge("energy_quiet", "1 in quiet hours: no background work begins.", float(now.quiet))
    yield _counter("energy_decisions", "Decisions of the scheduler.", now.decisions)
    yield _counter("energy_deferred", "Requests that were made to wait.", now.deferred)
    yield _counter(
        "energy_failures",
        "Failures of the scheduler, after which the clock alone chose.",
        now.failures,
    )
    took_s = {name: took_us / 1e6 for name, took_us in now.decision_us.items()}
    yield _by("energy_decision_seconds", "What lately decisions took.", "statistic", took_s)
    errors = {name: one for name, one in now.errors.items() if one is not None}
    told = "Median relative error of predicted times."
    yield _by("energy_prediction_error", told, "predicted", errors)


def _gauge(name: str, text: str, value: float | None) -> Metric:
    family = GaugeMetricFamily(f"tidegate_{name}", text)
    if value is not None:
        family.add_metric((), value)
    return family


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """A gauge by one label."""
    family = GaugeMetricFamily(f"tidegate_{name}", text, labels=(label,))
    for key, value in sorted(values.items()):
        family.add_metric((key,), value)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(f"tidegate_{name}", text)
    family.add_metric((), value)
    return family
