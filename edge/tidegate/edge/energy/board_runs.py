"""The runs of a profile that another model's costs can be scaled from, and their watts.

Watts are told in the widest scope that the profile has a map to. A mode has watts only where both
its run and an idle board were measured in that scope; if one mode has none, none has, since watts
of some modes say nothing about which to take.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.edge.energy.profile import Point, Profile

UNKNOWN: Final = "unknown"
"""The scope of watts that nobody measured."""

_BITS: Final = {
    "q4_k_m": 4.85,
    "q4 (class)": 4.85,
    "int4": 4.5,
    "w4a16": 4.5,
    "q8_0": 8.5,
    "fp16": 16.0,
}
"""Per weight, scales included, by the names that profiles use: llama.cpp's own figures for its
formats, 16 more for each 32 weights for the others."""
_NOMINAL: Final = re.compile(r"(\d+(?:\.\d+)?)([bm])$")
_FAR: Final = 8.0
"""Times as many bytes, from where scaling is little more than a guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """One run for each mode, all of one model in one format; None: the profile knows no run."""

    points: tuple[Point | None, ...]
    measured: tuple[bool, ...]
    """Whether the run was in the mode itself."""
    why: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeWatts:
    """Watts by mode: of a prompt, of decoding, idle."""

    scope: str
    watts: tuple[tuple[float, float, float], ...]
    why: tuple[str, ...]


def point_bytes(point: Point) -> float | None:
    """Bytes of a run's weights, by the parameters that the model's name tells and its format."""
    named, bits = _NOMINAL.search(point.model), _BITS.get(point.quant)
    if named is None or bits is None:
        return None
    return float(named[1]) * (1e9 if named[2] == "b" else 1e6) * bits / 8


def runs_for(profile: Profile, weight_bytes: int, modes: Sequence[str]) -> Runs:
    """The runs to go by: of a model that ran in most of `modes`, with watts, and of like size."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in profile.energy.point:
        if point.decode_tok_s and point_bytes(point):
            groups.setdefault((point.model, point.quant, point.runtime), []).append(point)
    if not groups:
        none = (None,) * len(modes)
        return Runs(points=none, measured=(False,) * len(modes), why=("the profile has no run",))
    group = max(groups.values(), key=lambda one: _merit(one, weight_bytes, modes))
    fastest = max(group, key=lambda one: (one.decode_tok_s or 0.0, one.active == "mean"))
    by_mode = {one.mode: one for one in group}
    points = tuple(by_mode.get(name, fastest) for name in modes)
    measured = tuple(name in by_mode or (None in by_mode and len(modes) == 1) for name in modes)
    return Runs(points=points, measured=measured, why=_why(fastest, weight_bytes, modes, measured))


def watts_of(profile: Profile, runs: Runs, modes: Sequence[str]) -> ModeWatts:
    """Watts of `modes` as far as the profile knows them; prompts take what decoding does."""
    scope, found, why = UNKNOWN, list[tuple[float, float, float]](), list[str]()
    for name, run, measured in zip(modes, runs.points, runs.measured, strict=True):
        if run is None or run.active_w is None or run.scope is None or not measured:
            return _unknown(modes, f"no run in mode {name} has watts")
        scope, active_w = _widest(profile, run.scope, run.active_w)
        idle_w = _idle_w(profile, scope, name, why)
        if idle_w is None:
            return _unknown(modes, f"nobody measured the idle board ({scope})")
        if run.active == "peak":
            why.append(f"watts of {name} are the peak of a run: more than its mean")
        if active_w < idle_w:
            why.append(f"a run in {name} took less than the idle board: no watts above idle")
        working_w = max(active_w, idle_w)
        found.append((working_w, working_w, idle_w))
    return ModeWatts(scope=scope, watts=tuple(found), why=(f"watts ({scope}) of the runs", *why))


def _unknown(modes: Sequence[str], reason: str) -> ModeWatts:
    why = f"watts are unknown: {reason}; only time decides"
    return ModeWatts(scope=UNKNOWN, watts=((0.0, 0.0, 0.0),) * len(modes), why=(why,))


def _merit(group: list[Point], weight_bytes: int, modes: Sequence[str]) -> tuple[float, ...]:
    known = {one.mode for one in group}
    powered = {one.mode for one in group if one.active_w is not None}
    size = point_bytes(group[0]) or 1.0
    return (
        len(powered & set(modes)),
        len(known & set(modes)),
        len(powered),
        -abs(math.log(max(1, weight_bytes) / size)),
    )


def _why(
    run: Point, weight_bytes: int, modes: Sequence[str], measured: Sequence[bool]
) -> tuple[str, ...]:
    size = point_bytes(run) or 1.0
    why = [f"scaled by bytes of weights from runs of {run.model} {run.quant} on {run.runtime}"]
    if not 1 / _FAR < max(1, weight_bytes) / size < _FAR:
        why.append(f"that model is {size / 1e6:.0f} MB and this one {weight_bytes / 1e6:.3g}: far")
    missing = [name for name, own in zip(modes, measured, strict=True) if not own]
    if missing:
        why.append(f"no run in {', '.join(missing)}: told from the fastest run")
    return tuple(why)


def _widest(profile: Profile, scope: str, watts: float) -> tuple[str, float]:
    """The widest scope that watts can be told in, and the watts there."""
    for one in profile.energy.scope_map:
        if one.from_ == scope:
            return one.to, one.a + one.b * watts
    return scope, watts


def _idle_w(profile: Profile, scope: str, mode: str, why: list[str]) -> float | None:
    """Watts of the idle board in `mode`, else in another mode, which is said in `why`."""
    told = {}
    for one in profile.energy.idle:
        its_scope, watts = _widest(profile, one.scope, one.w)
        if its_scope == scope:
            told[one.mode] = watts
    for name in (mode, None):
        if name in told:
            return told[name]
    if not told:
        return None
    name, watts = next(iter(told.items()))
    why.append(f"idle watts of {mode} are those of {name}: more than its own")
    return watts
