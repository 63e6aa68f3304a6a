"""Where a call would run and by which numbers, as `/route/explain` tells it; no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.errors import UnavailableError

_Json = Mapping[str, object]
_TERMS = ("local_j", "cloud_j", "late_local_s", "late_cloud_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What the scheduler by energy says. None where a way is closed."""

    mode: str
    """Power mode that the device would be in."""
    reason: str
    local_j: float | None
    """What running it on the device counts, and below in the cloud: joules, and what the weights
    make joules of, such as price, lateness and heat. None too where nobody knows the watts."""
    cloud_j: float | None
    late_local_s: float | None
    """Seconds after its deadline that nine of ten such answers would be there."""
    late_cloud_s: float | None
    more: Mapping[str, object] = field(default_factory=dict)
    """Whatever else the device tells, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Where a call would run now, and why; the call itself is decided anew."""

    route: str
    reason: str
    filters: object
    """What closes a place whatever it costs, for people."""
    edge_s: float | None
    """Predicted seconds to the whole answer on the device, and below in the cloud."""
    cloud_s: float | None
    pace: Pace | None
    """None where no scheduler by energy runs."""
    state: Mapping[str, object] = field(default_factory=dict)
    """What it was decided by, for people."""
    told: Mapping[str, object] = field(repr=False)
    """All of it, as it came."""


def read_explanation(data: object) -> Explanation:
    """The body of an answer of `/route/explain`.

    Raises:
        UnavailableError: it is no such body.
    """
    told = _object(data, "the explanation")
    clock = _object(told.get("clock"), "clock")
    pace = told.get("pace")
    return Explanation(
        route=_text(told, "route"),
        reason=_text(told, "reason"),
        filters=told.get("filters"),
        edge_s=_number(clock, "edge_s"),
        cloud_s=_number(clock, "cloud_s"),
        pace=None if pace is None else _pace(_object(pace, "pace")),
        state=_object(told.get("state"), "state"),
        told=told,
    )


def _pace(data: _Json) -> Pace:
    given = data.get("terms")
    terms: _Json = {} if given is None else _object(given, "pace.terms")
    local_j, cloud_j, late_local_s, late_cloud_s = (_number(terms, name) for name in _TERMS)
    return Pace(
        mode=_text(data, "mode"),
        reason=_text(data, "reason"),
        local_j=local_j,
        cloud_j=cloud_j,
        late_local_s=late_local_s,
        late_cloud_s=late_cloud_s,
        more={
            name: value for name, value in data.items() if name not in ("mode", "reason", "terms")
        },
    )


def _object(value: object, name: str) -> _Json:
    if not isinstance(value, dict):
        raise UnavailableError(f"no Tidegate device answered: {name} is not as it must be")
    return value


def _text(data: _Json, name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise UnavailableError(f"no Tidegate device answered: {name} is not as it must be")
    return value


def _number(data: _Json, name: str) -> float | None:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON's integers have no end
        return None
    return number if math.isfinite(number) else None
