"""Many runs side by side: every policy on the same jobs of every seed, and how pairs differ.

What is compared is compared within a seed: the same requests at the same times. Differences are of
medians over seeds, with the interval that 95 % of resamplings of the seeds fall in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final

from tidegate.edge.energy.battery_plan import BatteryPlan
from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.edge.energy.heat import Heat
from tidegate.edge.energy.pace_state import Weights
from tidegate.edge.energy.simulate.boards import Assumed
from tidegate.edge.energy.simulate.bound import BoundError, lower_bound
from tidegate.edge.energy.simulate.families import FAMILIES, jobs_of, stretch_for
from tidegate.edge.energy.simulate.jobs import Arrival, Job
from tidegate.edge.energy.simulate.policies import policies
from tidegate.edge.energy.simulate.run import Outcome, Setup, simulate
from tidegate.errors import ConfigError

_RESAMPLED: Final = 2000
_OUTAGES: Final = 4
BOUND: Final = "bound"
"""The name under which the bound stands beside the policies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A board in its surroundings, and what is asked of it.

    Args:
        costs: as they are believed and as they are.
        assumed: what the board is taken to be, beside its costs.
        radio: of the device.
        cloud: None: it has none.
        kind: a family of requests, or the kind that rows of a trace are taken for.
        requests: of one run.
        utilisation: share of the time that they would fill one at a time in the delivered mode;
            None: they come when the trace or family says.
        rows: of a trace, of which each seed takes a stretch; None: drawn by the family.
        weights: PACE's.
        true_watts: times the power above idle that policies believe in; see the +-30 % sweep.
        on_battery: whether the board lives on its battery, which shall last the whole run.
        clairvoyant: policies know true lengths.
        offline_share: of the time, in which the network is gone, in a few spans of equal length.
    """

    costs: CostModel
    assumed: Assumed
    radio: RadioCost
    cloud: CloudCost | None
    kind: str
    requests: int
    utilisation: float | None
    rows: Sequence[Arrival] | None = None
    weights: Weights | None = None
    true_watts: float = 1.0
    on_battery: bool = False
    clairvoyant: bool = False
    offline_share: float = 0.0

    @property
    def default_mode(self) -> int:
        """The mode that the board is delivered in."""
        return [mode.name for mode in self.costs.modes].index(self.assumed.default)

    @property
    def pace_told(self) -> str:
        """How fast requests come, for a person."""
        if self.utilisation is None:
            return "at the times of the trace"
        return f"at {self.utilisation:g} of the device"

    def jobs(self, seed: int) -> list[Job]:
        """The requests of one seed.

        Raises:
            ConfigError: the trace has too few rows, or a setting is out of range.
        """
        arrivals = self._arrivals(seed)
        stretch = 1.0
        if self.utilisation is not None:
            stretch = stretch_for(arrivals, self._alone_s, self.utilisation)
        return jobs_of(arrivals, self.kind, seed, stretch=stretch, alone_s=self._alone_s)

    def _arrivals(self, seed: int) -> Sequence[Arrival]:
        if self.rows is None:
            return FAMILIES[self.kind](self.requests, seed)
        spare = len(self.rows) - self.requests
        if spare < 0:
            allowed = f"at most the {len(self.rows)} of the trace"
            raise ConfigError("simulate.requests", self.requests, allowed)
        start = random.Random(f"trace {seed}").randint(0, spare)
        return self.rows[start : start + self.requests]

    def _alone_s(self, prompt: int, output: int) -> float:
        return self.costs.request_s(self.default_mode, prompt, output)

    def setup(self, jobs: Sequence[Job]) -> Setup:
        """The world that policies act in."""
        costs, assumed = self.costs.scaled(self.true_watts), self.assumed
        heat = None
        if assumed.poles:
            heat = Heat.settled(assumed.poles, assumed.ambient_c, costs.idle_w)
        setup = Setup(
            costs=costs,
            radio=self.radio,
            cloud=self.cloud,
            heat=heat,
            soft_c=assumed.soft_c,
            hard_c=assumed.hard_c,
            start_mode=self.default_mode,
            clairvoyant=self.clairvoyant,
            outages=_outages(jobs[-1].arrives_s, self.offline_share),
        )
        if not self.on_battery:
            return setup
        plan = BatteryPlan(reserve_j=0.0, until_s=jobs[-1].arrives_s, idle_w=costs.idle_w)
        return replace(setup, battery_j=assumed.battery_j, plan=plan)


def _outages(until_s: float, share: float) -> list[tuple[float, float]]:
    """Spans that take `share` of the time to `until_s`, each at the end of its part."""
    if not 0 <= share < 1:
        raise ConfigError("simulate.offline_share", share, "from 0 to less than 1")
    part_s = until_s / _OUTAGES
    ends_s = [part_s * (number + 1) for number in range(_OUTAGES)]
    return [(end_s - share * part_s, end_s) for end_s in ends_s] if share else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One policy on one seed. Joules and price are of one request on average."""

    policy: str
    seed: int
    requests: int
    missed: int
    unserved: int
    offloaded: int
    device_j: float
    system_j: float
    price: float
    soft_s: float
    hard_s: float
    switches: int
    hours: float
    battery_hours: float | None = None
    """Until it was empty; None: it lasted for as long as it was to, or there is none."""

    @property
    def cost(self) -> float:
        """What PACE minimises beside lateness: the system's joules and the owner's price."""
        return self.system_j + self.price


def run_cells(
    scene: Scene,
    names: Sequence[str],
    seeds: Sequence[int],
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Cell]:
    """Every policy of `names` on every seed; with `bound` among them, the bound for PACE's runs.

    Raises:
        ConfigError: a policy is unknown, or the scene cannot be simulated.
    """
    known = policies(
        scene.costs,
        default_mode=scene.default_mode,
        radio=scene.radio,
        cloud=scene.cloud,
        weights=scene.weights,
        battery=scene.on_battery,
    )
    for name in names:
        if name not in known and name != BOUND:
            raise ConfigError("policy", name, f"one of {', '.join([*known, BOUND])}")
    cells: list[Cell] = []
    done = 0
    for seed in seeds:
        jobs = scene.jobs(seed)
        setup = scene.setup(jobs)
        ours: Outcome | None = None
        for name in names:
            if name == BOUND:
                ours = ours or simulate(jobs, setup, known["pace"])
                cells.append(_bound_cell(scene, seed, jobs, setup, ours))
            else:
                outcome = simulate(jobs, setup, known[name])
                ours = outcome if name == "pace" else ours
                cells.append(_cell(name, seed, outcome, setup))
            done += 1
            report("simulating", done, len(seeds) * len(names))
    return cells


def _cell(name: str, seed: int, outcome: Outcome, setup: Setup) -> Cell:
    until_s = math.inf if setup.plan is None else setup.plan.until_s
    count, meter = len(outcome.ended) + outcome.unserved, outcome.meter
    return Cell(
        policy=name,
        seed=seed,
        requests=count,
        missed=outcome.missed,
        unserved=outcome.unserved,
        offloaded=outcome.offloaded,
        device_j=meter.device_j / count,
        system_j=meter.system_j / count,
        price=meter.price / count,
        soft_s=meter.soft_s,
        hard_s=meter.hard_s,
        switches=meter.switches,
        hours=outcome.seconds / 3600,
        battery_hours=outcome.empty_s / 3600 if outcome.empty_s < until_s else None,
    )


def _bound_cell(scene: Scene, seed: int, jobs: Sequence[Job], setup: Setup, ours: Outcome) -> Cell:
    ended = {one.job.id: one.at_s for one in ours.ended}
    until = [max(job.deadline_s, ended.get(job.id, math.inf)) for job in jobs]
    if not all(map(math.isfinite, until)):
        raise BoundError(f"bound: seed {seed}: requests were never served")
    found = lower_bound(jobs, setup.costs, radio=scene.radio, cloud=scene.cloud, until_s=until)
    each = found.joules / len(jobs)
    return Cell(
        policy=BOUND,
        seed=seed,
        requests=len(jobs),
        missed=ours.missed,
        unserved=0,
        offloaded=round(found.offloaded),
        device_j=math.nan,
        system_j=each,
        price=0.0,
        soft_s=0.0,
        hard_s=0.0,
        switches=0,
        hours=ours.seconds / 3600,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """How one policy's value compares with another's, and the interval of 95 %."""

    ratio: float
    low: float
    high: float


Pairs = Sequence[tuple[float, float]]


def paired(
    cells: Sequence[Cell], policy: str, other: str, value: Callable[[Cell], float]
) -> Paired:
    """How `policy` compares with `other`, seed by seed: the ratio of their sums.

    Raises:
        ConfigError: one of them did not run on every seed.
    """
    return _compared(cells, policy, other, value, _ratio)


def missed_more(cells: Sequence[Cell], policy: str, other: str) -> Paired:
    """The share of requests that `policy` misses, less that of `other`, seed by seed.

    Raises:
        ConfigError: as in `paired`.
    """
    return _compared(cells, policy, other, lambda one: one.missed / one.requests, _difference)


def _compared(
    cells: Sequence[Cell],
    policy: str,
    other: str,
    value: Callable[[Cell], float],
    compare: Callable[[Pairs], float],
) -> Paired:
    ours, theirs = _by_seed(cells, policy), _by_seed(cells, other)
    if not ours or set(ours) != set(theirs):
        raise ConfigError(
            "simulate.compare", (policy, other), "policies that ran on the same seeds"
        )
    pairs = [(value(ours[seed]), value(theirs[seed])) for seed in sorted(ours)]
    chance = random.Random(f"{policy} {other}")
    found = sorted(compare(chance.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLED))
    return Paired(
        ratio=compare(pairs),
        low=found[round(0.025 * (_RESAMPLED - 1))],
        high=found[round(0.975 * (_RESAMPLED - 1))],
    )


def _ratio(pairs: Pairs) -> float:
    below = sum(theirs for _, theirs in pairs)
    return sum(ours for ours, _ in pairs) / below if below else math.nan


def _difference(pairs: Pairs) -> float:
    return fmean(ours - theirs for ours, theirs in pairs)


def _by_seed(cells: Sequence[Cell], policy: str) -> Mapping[int, Cell]:
    return {cell.seed: cell for cell in cells if cell.policy == policy}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A policy over all seeds: means of one request, and shares of requests."""

    policy: str
    device_j: float
    system_j: float
    price: float
    missed_share: float
    offloaded_share: float
    soft_s: float
    hard_s: float
    switches_per_h: float
    cost_over_pace: Paired | None
    lasted_share: float | None = None
    """Of seeds, on which the battery lasted."""


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """One row per policy, in the order in which they ran."""
    names = list(dict.fromkeys(cell.policy for cell in cells))
    return [_row(cells, name, on_battery=_on_battery(cells)) for name in names]


def _on_battery(cells: Sequence[Cell]) -> bool:
    return any(cell.battery_hours is not None for cell in cells)


def _row(cells: Sequence[Cell], name: str, *, on_battery: bool) -> Row:
    own = [cell for cell in cells if cell.policy == name]
    hours = sum(cell.hours for cell in own)
    against = None
    if name != "pace" and any(cell.policy == "pace" for cell in cells):
        against = paired(cells, name, "pace", lambda cell: cell.cost)
    return Row(
        policy=name,
        device_j=fmean(cell.device_j for cell in own),
        system_j=fmean(cell.system_j for cell in own),
        price=fmean(cell.price for cell in own),
        missed_share=sum(cell.missed for cell in own) / sum(cell.requests for cell in own),
        offloaded_share=sum(cell.offloaded for cell in own) / sum(cell.requests for cell in own),
        soft_s=fmean(cell.soft_s for cell in own),
        hard_s=fmean(cell.hard_s for cell in own),
        switches_per_h=sum(cell.switches for cell in own) / hours if hours else 0.0,
        cost_over_pace=against,
        lasted_share=fmean(cell.battery_hours is None for cell in own) if on_battery else None,
    )
