"""A bound that no policy beats: the cheapest fractional schedule of a clairvoyant.

A linear programme over the intervals between arrivals and deadlines. In each interval and mode the
device computes parts of prompts, and steps of which each row takes part in at most all and at most
`rows` in each: seconds and joules of `tidegate.edge.energy.cost` are linear in these. Requests may
be cut anywhere, run in any order and mixture of modes, and leave in part; idling, changes of mode
and radio tails cost nothing. Whatever a policy does is such a schedule, so it costs at least as
much. With `whole`, a request leaves or stays as a whole (a mixed integer programme, for small
instances); with one row what stays can then really be scheduled, by earliest deadline first.
Source: energy-and-devices 3.3, with steps as variables in the place of enumerated batch sizes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.edge.energy.simulate.jobs import Job
from tidegate.errors import ConfigError, TidegateError


class BoundError(TidegateError):
    """No schedule at all meets the deadlines, or the solver gave up."""

    code = "bound_failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What the best schedule costs, in joules and the owner's price."""

    joules: float
    """Of the objective: the device's work, the cloud's joules and its price."""
    offloaded: float
    """Requests that left, in parts."""


@dataclass(kw_only=True)
class _Programme:
    """A sparse linear programme being written down: costs, and rows of equations and limits."""

    costs: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    integral: list[int] = field(default_factory=list)
    places: list[tuple[int, int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def variable(self, cost: float, most: float = math.inf, *, whole: bool = False) -> int:
        """A new one from 0 to `most`."""
        self.costs.append(cost)
        self.most.append(most)
        self.integral.append(int(whole))
        return len(self.costs) - 1

    def row(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """`low <= sum of factor * variable <= high`."""
        number = len(self.low)
        self.places += [(number, variable, factor) for variable, factor in terms]
        self.low.append(low)
        self.high.append(high)

    def least(self) -> tuple[float, list[float]]:
        """The least cost and the values that have it.

        Raises:
            BoundError: there is no solution, or none was found.
            ConfigError: scipy is not installed.
        """
        try:
            from scipy.optimize import Bounds, LinearConstraint, linprog, milp
            from scipy.sparse import csr_array
        except ImportError:
            allowed = "used with `pip install tidegate[simulate]`"
            raise ConfigError("policy", "bound", allowed) from None

        rows, columns, factors = zip(*self.places, strict=True)
        matrix = csr_array((factors, (rows, columns)), shape=(len(self.low), len(self.costs)))
        low, high = np.array(self.low), np.array(self.high)
        if not any(self.integral):
            same = low == high
            found = linprog(
                np.array(self.costs),
                A_ub=matrix[~same],
                b_ub=high[~same],
                A_eq=matrix[same],
                b_eq=high[same],
                bounds=np.column_stack([np.zeros(len(self.most)), np.array(self.most)]),
                method="highs-ipm",
            )
            if found.x is None or found.status != 0:
                raise BoundError(f"bound: no schedule: {found.message}")
            return float(found.fun), [float(value) for value in found.x]
        found = milp(
            np.array(self.costs),
            integrality=np.array(self.integral),
            bounds=Bounds(0.0, np.array(self.most)),
            constraints=LinearConstraint(matrix, np.array(self.low), np.array(self.high)),
        )
        if found.x is None:
            raise BoundError(f"bound: no schedule: {found.message}")
        # With integers, what the solver has proved and not what it has found.
        least = found.fun if found.mip_dual_bound is None else found.mip_dual_bound
        return float(least), [float(value) for value in found.x]


def lower_bound(
    jobs: Sequence[Job],
    costs: CostModel,
    *,
    radio: RadioCost | None = None,
    cloud: CloudCost | None = None,
    until_s: Sequence[float] | None = None,
    whole: bool = False,
) -> Bound:
    """The least that serving `jobs` costs.

    Args:
        jobs: with their true lengths.
        costs: exact ones.
        radio: of the device; none costs nothing.
        cloud: None: nothing may leave.
        until_s: of each job, to when it may end: its deadline, or when a policy ended it if that
            was later, so that the bound holds for that policy too.
        whole: requests leave as a whole or not at all.

    Raises:
        BoundError: no schedule is in time.
    """
    ends = [job.deadline_s for job in jobs] if until_s is None else list(until_s)
    edges = sorted({*(job.arrives_s for job in jobs), *ends})
    programme = _Programme()
    steps = [
        [programme.variable(_step_j(costs, mode)) for mode in range(len(costs.modes))]
        for _ in edges[1:]
    ]
    time: list[list[tuple[int, float]]] = [
        [(of, costs.modes[m].step_s - costs.modes[m].row_s) for m, of in enumerate(some)]
        for some in steps
    ]
    tokens: list[list[list[int]]] = [[[] for _ in costs.modes] for _ in edges[1:]]
    leaving: list[int | None] = []
    for job, end_s in zip(jobs, ends, strict=True):
        first, last = bisect_left(edges, job.arrives_s), bisect_left(edges, end_s)
        prompt: list[tuple[int, float]] = []
        answer: list[tuple[int, float]] = []
        for k in range(first, last):
            for m, mode in enumerate(costs.modes):
                token_s = mode.row_s + mode.context_token_s * _context(job)
                taken = programme.variable((mode.decode_w - costs.idle_w) * token_s)
                seconds = programme.variable(mode.prefill_w - costs.idle_w)
                programme.row([(taken, 1.0), (steps[k][m], -1.0)], -math.inf, 0.0)
                time[k] += [(taken, token_s), (seconds, 1.0)]
                tokens[k][m].append(taken)
                prompt.append((seconds, 1 / mode.prefill_s(job.prompt_tokens)))
                answer.append((taken, 1 / job.output_tokens))
        left = _leaving(programme, job, end_s, radio or RadioCost(), cloud, whole=whole)
        leaving.append(left)
        share = [] if left is None else [(left, 1.0)]
        programme.row([*prompt, *share], 1.0, 1.0)
        programme.row([*answer, *share], 1.0, 1.0)
    for k, (start_s, end_s) in enumerate(pairwise(edges)):
        programme.row(time[k], -math.inf, end_s - start_s)
        _share_steps(programme, steps[k], tokens[k], costs.rows)
    least, values = programme.least()
    return Bound(joules=least, offloaded=sum(values[of] for of in leaving if of is not None))


def _share_steps(
    programme: _Programme, steps: Sequence[int], tokens: Sequence[Sequence[int]], rows: int
) -> None:
    """At most `rows` take part in each step of an interval, mode by mode."""
    for of_steps, taken_here in zip(steps, tokens, strict=True):
        terms = [(one, 1.0) for one in taken_here]
        programme.row([*terms, (of_steps, -float(rows))], -math.inf, 0.0)


def _context(job: Job) -> float:
    """As the simulated board has it."""
    return job.prompt_tokens + job.output_tokens / 2


def _step_j(costs: CostModel, mode: int) -> float:
    """Of a step, before its rows: the first row's own part is in its tokens."""
    one = costs.modes[mode]
    return (one.decode_w - costs.idle_w) * (one.step_s - one.row_s)


def _leaving(
    programme: _Programme,
    job: Job,
    end_s: float,
    radio: RadioCost,
    cloud: CloudCost | None,
    *,
    whole: bool,
) -> int | None:
    """The variable of a job's leaving; None where it may not, or would not be back in time."""
    if cloud is None or job.private:
        return None
    if job.arrives_s + cloud.answer_s(radio, job.prompt_tokens, job.output_tokens) > end_s + 1e-6:
        return None
    joules = cloud.device_j(radio, job.prompt_tokens, job.output_tokens, tail=0.0)
    joules += (cloud.token_j + cloud.token_price) * job.output_tokens
    return programme.variable(joules, 1.0, whole=whole)
