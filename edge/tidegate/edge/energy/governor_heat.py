"""What the measured temperature says of the next seconds: PACE's `rest_k`, `warming_kw`, `fastest`.

With a profile's poles the warmth of each is carried on by the watts that were drawn, and what the
reading differs by is put on them in proportion to their kelvin per watt. Without poles nothing can
be predicted: above the soft limit one mode is taken off every few seconds, and given back below it.
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
"""Between two modes that are taken off or given back without a prediction; PACE's dwell."""
_BACK_K: Final = 3.0
"""Below the soft limit before one is given back."""
_COOLEST_C: Final = 10.0
"""Surroundings that a first reading may be explained by, and below the warmest."""
_WARMEST_C: Final = 45.0


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
        self._taken = 0
        self._changed_s = -math.inf

    def see(self, sample: Sample, costs: CostModel) -> Outlook:
        """What a new sample says; a board whose temperature is unknown has no limits."""
        if sample.celsius is None or not math.isfinite(sample.celsius):
            self._heat = None
            return Outlook()
        if not self._poles or costs.scope == "unknown":
            return Outlook(fastest=self._stepwise(sample, sample.celsius, costs))
        heat = self._follow(sample, sample.celsius)
        soft_c = math.inf if sample.soft_c is None else sample.soft_c
        return Outlook(
            rest_k=heat.after(0.0, FORESIGHT_S).now_c - soft_c,
            warming_kw=heat.kelvin_per_watt(FORESIGHT_S),
            fastest=_cap(heat, sample.hard_c, costs),
        )

    def _follow(self, sample: Sample, celsius: float) -> Heat:
        """The warmth of each pole, such that together they are what was read."""
        if self._heat is None:
            warm_k = sum(pole.r_kw for pole in self._poles) * sample.watts
            ambient_c = min(_WARMEST_C, max(_COOLEST_C, celsius - warm_k))
            heat = Heat.settled(self._poles, min(ambient_c, celsius), sample.watts)
        else:
            heat = self._heat.after(sample.watts, max(0.0, sample.at_s - self._at_s))
        self._heat, self._at_s = _fitted(heat, celsius), sample.at_s
        return self._heat

    def _stepwise(self, sample: Sample, celsius: float, costs: CostModel) -> int | None:
        soft_c, hard_c = sample.soft_c, sample.hard_c
        if hard_c is not None and celsius >= hard_c - HARD_MARGIN_K:
            if self._taken < costs.fastest:
                self._taken, self._changed_s = costs.fastest, sample.at_s
        elif soft_c is not None and sample.at_s - self._changed_s >= _EVERY_S:
            if celsius >= soft_c and self._taken < costs.fastest:
                self._taken, self._changed_s = self._taken + 1, sample.at_s
            elif celsius < soft_c - _BACK_K and self._taken > 0:
                self._taken, self._changed_s = self._taken - 1, sample.at_s
        elif soft_c is None:
            self._taken = 0
        return costs.fastest - self._taken if self._taken else None


def _fitted(heat: Heat, celsius: float) -> Heat:
    """With the reading as its temperature, and no pole colder than the surroundings."""
    off_k = celsius - heat.now_c
    total_kw = sum(pole.r_kw for pole in heat.poles)
    warmth = [
        max(0.0, now_k + off_k * pole.r_kw / total_kw)
        for pole, now_k in zip(heat.poles, heat.warmth_k, strict=True)
    ]
    excess_k = heat.ambient_c + sum(warmth) - celsius
    if excess_k <= 0:
        return replace(heat, warmth_k=tuple(warmth))
    keeps = max(0.0, 1 - excess_k / sum(warmth)) if sum(warmth) else 0.0
    warmth = [one * keeps for one in warmth]
    return replace(heat, warmth_k=tuple(warmth), ambient_c=celsius - sum(warmth))


def _cap(heat: Heat, hard_c: float | None, costs: CostModel) -> int | None:
    """The fastest mode that stays below the hard limit for as long as is looked ahead."""
    if hard_c is None:
        return None
    most_w = heat.most_watts(hard_c - HARD_MARGIN_K, FORESIGHT_S)
    cap = 0
    if heat.now_c >= hard_c - HARD_MARGIN_K:
        return cap
    for number, mode in enumerate(costs.modes):
        if max(mode.prefill_w, mode.decode_w) <= most_w:
            cap = number
    return None if cap == costs.fastest else cap
