"""Boards to simulate: a profile's measured points, and what nobody measured as named assumptions.

A profile leaves empty what is unknown; a simulation needs a value. Each value that is ours stands
in `Assumed` with its reason, is printed with the result, and is what the +-30 % sweep is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.edge.energy.cost import CloudCost, CostModel, ModeCost, RadioCost
from tidegate.edge.energy.heat import HeatPole
from tidegate.edge.energy.profile import Point, Profile, ScopeMap
from tidegate.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """An assumed power mode of a board that was measured at full clocks only, as shares of that.

    Decoding waits for memory and loses less than the clocks do; power above idle goes with clocks
    and voltage, about as their power of 2.2 for cores and not at all for memory.
    """

    name: str
    prefill: float
    decode: float
    power: float


FULL: Final = (Clock(name="full", prefill=1.0, decode=1.0, power=1.0),)
CLOCKS: Final = (
    Clock(name="0.6", prefill=0.6, decode=0.85, power=0.5),
    Clock(name="0.8", prefill=0.8, decode=0.95, power=0.7),
    *FULL,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumed:
    """What is not in a profile.

    Args:
        model: of the profile's points.
        idle_w: of modes without a measured idle power, in the scope of the points.
        prefill_ratio: prompt tokens a second over generated ones, where prefill was not measured.
        row_share: of a step, that each further row adds.
        context_share: of a step, that a context of 1 024 tokens adds.
        rows: requests that share steps.
        clocks: modes, where only one was measured.
        poles: of heat, where the profile has none or half.
        ambient_c: around the board.
        soft_c: where it should not be for long.
        hard_c: where it must not be.
        switch_s: that a change of mode takes.
        switch_j: that it costs.
        battery_j: that it holds; 0: it has none.
        default: name of the mode it is delivered in.
        why: the reasons, for the result.
    """

    model: str
    idle_w: Mapping[str, float]
    default: str
    prefill_ratio: float = 10.0
    row_share: float = 0.12
    context_share: float = 0.08
    rows: int = 4
    clocks: tuple[Clock, ...] = FULL
    poles: tuple[HeatPole, ...] = ()
    ambient_c: float = 30.0
    soft_c: float = 75.0
    hard_c: float = 90.0
    switch_s: float = 0.05
    switch_j: float = 0.5
    battery_j: float = 0.0
    why: str


ASSUMED: Final[Mapping[str, Assumed]] = {
    "jetson-orin-nano-8gb-super": Assumed(
        model="llama-3.2-1b",
        idle_w={"7W": 4.6, "15W": 4.8, "25W": 5.2, "MAXN_SUPER": 6.29},
        default="25W",
        row_share=0.05,
        rows=8,
        poles=(HeatPole(r_kw=0.66, tau_s=5.0), HeatPole(r_kw=0.5, tau_s=200.0)),
        soft_c=70.0,
        hard_c=85.0,
        switch_s=0.2,
        switch_j=1.0,
        why="idle below MAXN_SUPER from an Orin NX at 4.6 W; heatsink pole 0.5 K/W in 200 s",
    ),
    "raspberry-pi-5": Assumed(
        model="llama-3.2-3b",
        idle_w={"0.6": 2.6, "0.8": 2.8, "full": 3.0},
        default="full",
        prefill_ratio=7.0,
        row_share=0.5,
        rows=2,
        clocks=CLOCKS,
        poles=(HeatPole(r_kw=2.0, tau_s=8.0), HeatPole(r_kw=2.2, tau_s=180.0)),
        soft_c=80.0,
        hard_c=85.0,
        why="idle 3 W, prefill 7 times decode, 4.2 K/W with a fan, clocks below full by formula",
    ),
    "intel-n100-class": Assumed(
        model="llama-3.2-3b",
        idle_w={"0.6": 7.0, "0.8": 7.5, "full": 8.0},
        default="full",
        prefill_ratio=7.0,
        row_share=0.3,
        rows=4,
        clocks=CLOCKS,
        poles=(HeatPole(r_kw=1.0, tau_s=10.0), HeatPole(r_kw=1.2, tau_s=300.0)),
        soft_c=85.0,
        hard_c=100.0,
        why="idle 8 W at the wall, prefill 7 times decode, 2.2 K/W, clocks below full by formula",
    ),
    "ryzen-laptop": Assumed(
        model="llama-3.2-3b",
        idle_w={"0.6": 6.0, "0.8": 6.5, "full": 7.0},
        default="full",
        prefill_ratio=10.0,
        row_share=0.2,
        rows=4,
        clocks=CLOCKS,
        poles=(HeatPole(r_kw=0.5, tau_s=10.0), HeatPole(r_kw=0.6, tau_s=240.0)),
        soft_c=85.0,
        hard_c=100.0,
        battery_j=60.0 * 3600,
        why="idle 7 W, battery of 60 Wh, prefill 10 times decode, clocks below full by formula",
    ),
}

WIFI: Final = RadioCost(
    up_byte_j=2.3e-6,
    down_byte_j=1.15e-6,
    tail_w=0.25,
    tail_s=0.24,
    up_byte_s=4e-7,
    down_byte_s=4e-7,
)
"""2012's parameters at 20 Mbit/s: the reference, 2.5."""
LTE: Final = RadioCost(
    up_byte_j=4.5e-6,
    down_byte_j=1.45e-6,
    connected_w=1.29,
    tail_w=1.06,
    tail_s=11.576,
    up_byte_s=8e-7,
    down_byte_s=8e-7,
)
RADIOS: Final[Mapping[str, RadioCost]] = {"ethernet": RadioCost(), "wifi": WIFI, "lte": LTE}

GPU_CLOUD: Final = CloudCost(
    rtt_s=0.08,
    wait_s=0.15,
    prefill_token_s=1 / 8000,
    token_s=1 / 60,
    token_j=1.5 * (0.070 + 2.989 / 16),
    token_price=1.0,
)
"""An H100 with 16 answers at a time, times 1.5 for its host and building (the reference, 2.3). The
price is the owner's to set: at one joule a token a device keeps what it can answer in time."""


def costs_of(profile: Profile, assumed: Assumed) -> CostModel:
    """Costs in the scope that the profile's points can be brought to.

    Raises:
        ConfigError: the profile has no point of the model that says both speed and power.
    """
    points = [
        point
        for point in profile.energy.point
        if point.model == assumed.model and point.active_w and point.decode_tok_s
    ]
    if not points:
        allowed = f"a profile with measured points of {assumed.model!r}"
        raise ConfigError("simulate.profile", profile.id, allowed)
    if any(point.mode for point in points):
        modes = [_measured(point, profile.energy.scope_map, assumed) for point in points]
    else:
        best = max(points, key=lambda point: point.decode_tok_s or 0.0)
        modes = [_clocked(best, clock, assumed) for clock in assumed.clocks]
    modes.sort(key=lambda mode: -mode.step_s)
    return CostModel(
        modes=tuple(modes),
        rows=assumed.rows,
        scope=_scope(points[0], profile.energy.scope_map)[0],
        source="estimated",
        switch_s=assumed.switch_s,
        switch_j=assumed.switch_j,
    )


def _scope(point: Point, maps: Sequence[ScopeMap]) -> tuple[str, float, float]:
    """The widest scope that `point` can be told in, and the line that leads there."""
    for one in maps:
        if one.from_ == point.scope:
            return one.to, one.a, one.b
    return point.scope or "unknown", 0.0, 1.0


def _measured(point: Point, maps: Sequence[ScopeMap], assumed: Assumed) -> ModeCost:
    assert point.decode_tok_s, "as it was chosen"
    assert point.active_w, "as it was chosen"
    if point.mode is None:
        raise ConfigError("simulate.profile", point.model, "points that all name their mode")
    _, a, b = _scope(point, maps)
    watts = a + b * point.active_w
    prefill = point.prefill_tok_s or point.decode_tok_s * assumed.prefill_ratio
    return _mode(point.mode, 1 / prefill, 1 / point.decode_tok_s, watts, assumed)


def _clocked(point: Point, clock: Clock, assumed: Assumed) -> ModeCost:
    assert point.decode_tok_s, "as it was chosen"
    assert point.active_w, "as it was chosen"
    full_w = assumed.idle_w[assumed.clocks[-1].name]
    idle_w = assumed.idle_w[clock.name]
    watts = idle_w + (point.active_w - full_w) * clock.power
    decode = point.decode_tok_s * clock.decode
    prefill = point.decode_tok_s * assumed.prefill_ratio * clock.prefill
    return _mode(clock.name, 1 / prefill, 1 / decode, watts, assumed)


def _mode(
    name: str, prefill_token_s: float, step_s: float, watts: float, assumed: Assumed
) -> ModeCost:
    return ModeCost(
        name=name,
        prefill_token_s=prefill_token_s,
        step_s=step_s,
        context_token_s=step_s * assumed.context_share / 1024,
        row_s=step_s * assumed.row_share,
        prefill_w=watts,
        decode_w=watts,
        idle_w=assumed.idle_w[name],
    )
