"""What a well-formed profile must also hold: sources, scopes, one knee, names that exist.

Pure: every rule reads the decoded profile and raises the first breach it finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Final

from tidegate.edge.energy.fitted_costs import fitted_modes
from tidegate.edge.energy.profile import ALL_KEYS, FittedCosts, Profile
from tidegate.edge.energy.profile_decode import Origins, Path, key_of
from tidegate.errors import ConfigError

SCOPES: Final = ("module", "board_dc", "wall", "package", "platform", "radio")
"""What watts may cover, besides one rail (`rail:LABEL`)."""

_SCOPE: Final = re.compile(rf"{'|'.join(SCOPES)}|rail:[A-Za-z0-9_]+")
_ID: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_NUMBERED: Final = re.compile(r"hwmon\d|thermal_zone\d|iio:device\d")
_SHARE: Final = re.compile(r"([1-9][0-9]?|100)%")


def check_profile(profile: Profile, origins: Origins) -> None:
    """Raise `ProfileError` naming file and key of the first rule that is broken."""
    if not _ID.fullmatch(profile.id):
        raise origins.error(("id",), profile.id, "lower-case words and numbers joined by -")
    for path, table in _tables(profile, ()):
        _check_sources(table, path, profile, origins)
        _check_scopes(table, path, origins)
    _check_points(profile, origins)
    _check_modes(profile, origins)
    _check_sensors(profile, origins)
    _check_limits(profile, origins)
    check_costs(profile.cost, origins)


def _tables(table: object, path: Path) -> Iterator[tuple[Path, object]]:
    """Every dataclass of the profile with its path, the profile itself first."""
    if is_dataclass(table):
        yield path, table
        for one in fields(table):
            yield from _tables(getattr(table, one.name), (*path, key_of(one)))
    elif isinstance(table, tuple):
        for n, inner in enumerate(table):
            yield from _tables(inner, (*path, f"[{n}]"))
    elif isinstance(table, Mapping):
        for key, inner in table.items():
            yield from _tables(inner, (*path, key))


def _check_sources(table: object, path: Path, profile: Profile, origins: Origins) -> None:
    """Every number of a table, and every knee, names a source that the profile lists."""
    src: Mapping[str, str] | None = getattr(table, "src", None)
    if src is None:
        return
    assert is_dataclass(table)
    keys = {key_of(one): getattr(table, one.name) for one in fields(table)}
    for key, name in src.items():
        if key != ALL_KEYS and keys.get(key) is None:
            raise origins.error((*path, "src", key), name, "the source of a key that is there")
        if name not in profile.sources:
            known = ", ".join(profile.sources) or "none yet"
            raise origins.error((*path, "src"), name, f"in [sources] ({known})")
    for key, value in keys.items():
        wants = _has_number(value) or (key == "knee" and value is True)
        if key not in ("score", "batch") and wants and not {key, ALL_KEYS} & src.keys():
            raise origins.error((*path, key), value, "of a source: src is missing")


def _has_number(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_number, value.values()))
    if isinstance(value, tuple):
        return any(map(_has_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_scopes(table: object, path: Path, origins: Origins) -> None:
    for key in ("scope", "from_", "to"):
        scope = getattr(table, key, None)
        if scope is not None and not _SCOPE.fullmatch(scope):
            allowed = f"one of {', '.join(SCOPES)}, or rail:LABEL"
            raise origins.error((*path, key.removesuffix("_")), scope, allowed)


def _check_points(profile: Profile, origins: Origins) -> None:
    for n, point in enumerate(profile.energy.point):
        path = ("energy", "point", f"[{n}]")
        if point.active_w is not None and point.scope is None:
            raise origins.error((*path, "scope"), None, "given: what active_w covers")
        if point.batch < 1:
            raise origins.error((*path, "batch"), point.batch, "at least 1")


def _check_modes(profile: Profile, origins: Origins) -> None:
    """Names are unique and known where they are used; one knee and one default at most."""
    modes, here = profile.power.mode, ("power", "mode")
    names = [mode.name for mode in modes]
    for name in names:
        if names.count(name) > 1:
            raise origins.error(here, name, "named once")
    for flag in ("knee", "default"):
        marked = [mode.name for mode in modes if getattr(mode, flag)]
        if len(marked) > 1:
            raise origins.error(here, marked, f"one mode with {flag} = true at most")
    if modes and profile.power.tool == "none":
        raise origins.error(("power", "tool"), "none", "the tool that switches the modes")
    used: list[tuple[Path, str]] = [
        (("hardware", "mem_bandwidth_gbs"), name) for name in profile.hardware.mem_bandwidth_gbs
    ]
    for kind in ("idle", "load", "point"):
        rows = enumerate(getattr(profile.energy, kind))
        used += [(("energy", kind, f"[{n}]", "mode"), one.mode) for n, one in rows if one.mode]
    for path, name in used:
        if name not in names:
            raise origins.error(
                path, name, f"a power mode ({', '.join(names) or 'there are none'})"
            )


def _check_sensors(profile: Profile, origins: Origins) -> None:
    for n, sensor in enumerate(profile.sensor.power):
        path = ("sensor", "power", f"[{n}]")
        if sensor.glob is not None and _NUMBERED.search(sensor.glob):
            raise origins.error(
                (*path, "glob"),
                sensor.glob,
                "a pattern: numbers such as hwmon3 change at every boot",
            )
        if sensor.glob is not None and not sensor.glob.startswith("/"):
            raise origins.error((*path, "glob"), sensor.glob, "a pattern from the root")
        if "total" in sensor.rails and sensor.scope is None:
            raise origins.error((*path, "scope"), None, "given: what the rail total covers")
    for n, zone in enumerate(profile.sensor.thermal):
        if zone.soft_c is not None and zone.hard_c is not None and zone.soft_c >= zone.hard_c:
            where = ("sensor", "thermal", f"[{n}]", "soft_c")
            raise origins.error(where, zone.soft_c, f"below hard_c ({zone.hard_c})")


def check_costs(costs: Sequence[FittedCosts], origins: Origins) -> None:
    """Raise `ProfileError` for the first fitted costs that a cost model cannot be made of."""
    for n, one in enumerate(costs):
        path: Path = ("cost", f"[{n}]")
        if one.rows < 1:
            raise origins.error((*path, "rows"), one.rows, "at least 1")
        for m, mode in enumerate(one.mode):
            watts = (mode.prefill_w, mode.decode_w, mode.idle_w)
            if None in watts and any(one is not None for one in watts):
                allowed = "prefill_w, decode_w and idle_w, or none of them"
                raise origins.error((*path, "mode", f"[{m}]"), list(watts), allowed)
        if one.scope is None and any(mode.idle_w is not None for mode in one.mode):
            raise origins.error((*path, "scope"), None, "given: what the watts cover")
        try:
            fitted_modes(one)
        except ConfigError as error:
            value = f"{error.setting.removeprefix('cost.')}"
            raise origins.error((*path, "mode"), value, error.allowed) from error


def _check_limits(profile: Profile, origins: Origins) -> None:
    runtime, detect = profile.runtime, profile.detect
    for key in ("threads", "rows", "kv_mib", "max_model_mib"):
        if getattr(runtime, key) == 0:
            raise origins.error(("runtime", key), 0, "at least 1, or absent")
    if not runtime.providers or len(set(runtime.providers)) < len(runtime.providers):
        raise origins.error(("runtime", "providers"), list(runtime.providers), "names, each once")
    share = profile.service.memory_max
    if share is not None and not _SHARE.fullmatch(share):
        raise origins.error(("service", "memory_max"), share, "a share from 1% to 100%")
    if detect is not None and detect.mem_mib:
        bounds = detect.mem_mib
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise origins.error(("detect", "mem_mib"), list(bounds), "[least, most]")
    if profile.status == "verified" and profile.calibration is None:
        raise origins.error(("status",), "verified", "seeded as long as there is no [calibration]")
    if profile.abstract and detect is not None:
        raise origins.error(("detect",), "a table", "absent: an abstract profile is no board")
