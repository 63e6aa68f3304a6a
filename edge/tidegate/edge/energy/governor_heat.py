"""What the measured temperature says of the next seconds: PACE's `rest_k`, `warming_kw`, `fastest`.

The warmth of each pole of a profile is carried on by the watts that were drawn; what the reading
differs by is put on the surroundings, since whatever is not in the profile (a heatsink, a case, the
sun) is slow beside the seconds looked ahead. Without poles nothing can be predicted: above the soft
limit one mode is taken off every few seconds, and given back below it. A mode is taken off at once
and given back only some kelvin below its limit and a while later, so that noise switches nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.heat import Heat, HeatPole
from tidegate.edge.energy.profile import Thermal
from tidegate.edge.energy.sensors.sample import Sample

FORESIGHT_S: Final = 20.0
"""That heat is predicted for: as in the simulator."""
HARD_MARGIN_K: Final = 1.0
_EVERY_S: Final = 10.0
"""Between two modes that are taken off without a prediction, or given back; PACE's dwell."""
_BACK_K: Final = 3.0
"""Below the limit before one is given back."""
_COOLEST_C: Final = 10.0
"""Surroundings below which it is rather the poles that are less warm than thought."""
BLIND_S: Final = 60.0
"""That the last outlook is kept while no temperature can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """For a `PaceState`; the defaults are those of a board without limits."""

    rest_k: float = -math.inf
    warming_kw: float = 0.0
    fastest: int | None = None


def poles_of(thermal: Thermal) -> tuple[HeatPole, ...]:
    """The poles of a profile whose time is known."""
    return tuple(
        HeatPole(r_kw=pole.r_kw, tau_s=pole.tau_s)
        for pole in thermal.pole
        if pole.tau_s is not None
    )


class HeatWatch:
    """Follows the temperature of one board."""

    def __init__(self, poles: Sequence[HeatPole]) -> None:
        """Watch a board with these poles; without any there is no prediction."""
        self._poles = tuple(poles)
        self._heat: Heat | None = None
        self._at_s = -math.inf
        self._last: Outlook | None = None
        """None until a temperature with a limit was read."""
        self._cap: int | None = None
        self._changed_s = -math.inf
        self.fault: str | None = None
        """Why modes are limited though no temperature says so."""

    def see(self, sample: Sample, costs: CostModel) -> Outlook:
        """What a new sample says; a board whose temperature never was read has no limits."""
        celsius = sample.celsius
        if celsius is None or not math.isfinite(celsius):
            return self.unseen(sample.at_s, costs)
        if sample.at_s - self._at_s > BLIND_S:
            self._heat = None
        self.fault = None
        if not self._poles or costs.scope == "unknown":
            self._stepwise(sample, celsius, costs)
            outlook = Outlook(fastest=self._cap)
        else:
            heat = self._follow(sample, celsius)
            self._limit(heat, sample, costs)
            soft_c = math.inf if sample.soft_c is None else sample.soft_c
            outlook = Outlook(
                rest_k=heat.after(0.0, FORESIGHT_S).now_c - soft_c,
                warming_kw=heat.kelvin_per_watt(FORESIGHT_S),
                fastest=self._cap,
            )
        self._at_s = sample.at_s
        if sample.soft_c is not None or sample.hard_c is not None:
            self._last = outlook
        return outlook

    def unseen(self, at_s: float, costs: CostModel) -> Outlook:
        """No temperature can be read: the last outlook for a while, then the knee at most."""
        if self._last is None:
            return Outlook()
        blind_s = at_s - self._at_s
        if blind_s <= BLIND_S:
            return self._last
        knee, last = costs.knee, self._last.fastest
        self._cap = _unless_fastest(knee if last is None else min(knee, last), costs)
        self.fault = (
            f"no temperature could be read for {BLIND_S:g} s: no power mode above"
            f" {costs.modes[costs.fastest if self._cap is None else self._cap].name} is taken"
        )
        return Outlook(fastest=self._cap)

    def _follow(self, sample: Sample, celsius: float) -> Heat:
        """The warmth of each pole, and surroundings with which they are what was read."""
        watts = max(0.0, sample.watts)
        if self._heat is None:
            heat = Heat.settled(self._poles, 0.0, watts)
        else:
            heat = self._heat.after(watts, max(0.0, sample.at_s - self._at_s))
        self._heat = _fitted(heat, celsius)
        return self._heat

    def _limit(self, heat: Heat, sample: Sample, costs: CostModel) -> None:
        """Take off at once what would pass the hard limit; give back with room and in time."""
        now = _live(heat, sample.hard_c, 0.0, costs)
        cap = costs.fastest if self._cap is None else min(self._cap, costs.fastest)
        if now < cap:
            self._change(now, sample.at_s, costs)
        elif now > cap and sample.at_s - self._changed_s >= _EVERY_S:
            back = _live(heat, sample.hard_c, _BACK_K, costs)
            if back > cap:
                self._change(back, sample.at_s, costs)

    def _stepwise(self, sample: Sample, celsius: float, costs: CostModel) -> None:
        soft_c, hard_c = sample.soft_c, sample.hard_c
        cap = costs.fastest if self._cap is None else min(self._cap, costs.fastest)
        most_c = math.inf if hard_c is None else hard_c - HARD_MARGIN_K
        limit_c = most_c if soft_c is None else min(soft_c, most_c)
        if celsius >= most_c:
            if cap > 0:
                self._change(0, sample.at_s, costs)
        elif sample.at_s - self._changed_s >= _EVERY_S:
            if celsius >= limit_c and cap > 0:
                self._change(cap - 1, sample.at_s, costs)
            elif celsius < limit_c - _BACK_K and cap < costs.fastest:
                self._change(cap + 1, sample.at_s, costs)

    def _change(self, cap: int, at_s: float, costs: CostModel) -> None:
        self._cap, self._changed_s = _unless_fastest(cap, costs), at_s


def _unless_fastest(cap: int, costs: CostModel) -> int | None:
    return None if cap >= costs.fastest else cap


def _fitted(heat: Heat, celsius: float) -> Heat:
    """With the reading as its temperature: surroundings, unless too cold, tell the difference."""
    warm_k = sum(heat.warmth_k)
    most_k = max(0.0, celsius - _COOLEST_C)
    keeps = min(1.0, most_k / warm_k) if warm_k > 0 else 1.0
    warmth = tuple(one * keeps for one in heat.warmth_k)
    return replace(heat, warmth_k=warmth, ambient_c=celsius - sum(warmth))


def _live(heat: Heat, hard_c: float | None, room_k: float, costs: CostModel) -> int:
    """The fastest mode that stays `room_k` below the hard limit for as long as is looked ahead."""
    if hard_c is None:
        return costs.fastest
    limit_c = hard_c - HARD_MARGIN_K - room_k
    if heat.now_c >= limit_c:
        return 0
    most_w = heat.most_watts(limit_c, FORESIGHT_S)
    modes = enumerate(costs.modes)
    return max((n for n, one in modes if max(one.prefill_w, one.decode_w) <= most_w), default=0)
