"""One simulated stretch of time: jobs in, what became of them and of the joules out.

An event is whatever may change a decision: an arrival, an end, a mode that has come, the network
going or coming back, a time the policy asked for. At each the policy decides on a `PaceState`, as
the daemon's does. Nothing is drawn by chance here: the same jobs and settings give the same result.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tidegate.edge.energy.battery_plan import BatteryPlan, EnergyDebt
from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.edge.energy.heat import Heat
from tidegate.edge.energy.lengths import AnswerLengths
from tidegate.edge.energy.pace_state import Decision, PaceState, Running, Waiting
from tidegate.edge.energy.simulate.board import Board, Meter, Row
from tidegate.edge.energy.simulate.jobs import Job

_LOOK_S = 5.0
"""Between looks at temperature and battery while something runs."""
_FORESIGHT_S = 20.0
"""That heat is predicted for: a few time constants of a die, and twice the usual dwell."""
_HARD_MARGIN_K = 1.0
_DRAWN_S = 2.0
"""To the first point of a plot after an event; each next one is half as far again."""


class Policy(Protocol):
    """Decides. `tidegate.edge.energy.pace.Pace` is one."""

    def decide(self, state: PaceState) -> Decision:
        """What to do in `state`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The board, its surroundings, and how the world really is."""

    costs: CostModel
    radio: RadioCost = field(default_factory=RadioCost)
    cloud: CloudCost | None = None
    outages: Sequence[tuple[float, float]] = ()
    """From and until when the network is gone, in order and apart."""
    heat: Heat | None = None
    soft_c: float = math.inf
    hard_c: float = math.inf
    battery_j: float = math.inf
    plan: BatteryPlan | None = None
    quiet: Sequence[tuple[float, float]] = ()
    start_mode: int = 0
    clairvoyant: bool = False
    """Policies are told true lengths: tells errors of prediction from those of scheduling."""
    most_output: int = 512
    """What a request may have at most, which is known beforehand."""
    keep_line: bool = False
    """Keep a line of (time, temperature, battery) for plots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What became of a job."""

    job: Job
    at_s: float
    route: str

    @property
    def missed(self) -> bool:
        """Whether it came after its deadline."""
        return self.at_s > self.job.deadline_s + 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one run. `ended` is in the order of ends; unserved jobs have none."""

    ended: tuple[Ended, ...]
    unserved: int
    meter: Meter
    seconds: float
    battery_j: float
    empty_s: float
    decisions: int
    line: tuple[tuple[float, float, float], ...] = ()

    @property
    def missed(self) -> int:
        """Requests that came late or never."""
        return sum(one.missed for one in self.ended) + self.unserved

    @property
    def offloaded(self) -> int:
        """Requests that the cloud answered."""
        return sum(one.route == "cloud" for one in self.ended)


def simulate(jobs: Sequence[Job], setup: Setup, policy: Policy) -> Outcome:
    """Run `jobs`, in the order of their arrival, to their ends.

    A request that no policy serves (private, on a dead battery) is unserved once nothing else is
    left to happen.
    """
    return _Run(jobs, setup, policy).outcome()


class _Run:
    def __init__(self, jobs: Sequence[Job], setup: Setup, policy: Policy) -> None:
        self.jobs, self.setup, self.policy = jobs, setup, policy
        self.board = Board(
            costs=setup.costs,
            mode=setup.start_mode,
            heat=setup.heat,
            soft_c=setup.soft_c,
            hard_c=setup.hard_c,
            battery_j=setup.battery_j,
        )
        self.waiting: dict[str, tuple[Job, Waiting]] = {}
        self.lengths: dict[str, AnswerLengths] = {}
        self.away: list[tuple[float, int, Job]] = []
        self.ended: list[Ended] = []
        self.debt = EnergyDebt(plan=setup.plan)
        self.tail_until_s = -math.inf
        self.wake_s = math.inf
        self.place = 0
        self.decisions = 0
        self.line: list[tuple[float, float, float]] = []
        self.worked_j = self.accounted_s = 0.0
        self.warming_kw = 0.0
        if setup.heat is not None:
            self.warming_kw = setup.heat.kelvin_per_watt(_FORESIGHT_S)
        self.sent = 0
        edges = [at for outage in setup.outages for at in outage]
        self.edges = sorted(edges + [at for span in setup.quiet for at in span])

    def outcome(self) -> Outcome:
        """Run to the end."""
        while True:
            at_s = self._next_s()
            if at_s == math.inf:
                break
            if self.setup.keep_line:
                self._draw_to(at_s)
            for row in self.board.advance(at_s):
                self._end(row.job, "edge")
            self._account()
            if self.board.battery_j <= 0:
                break  # nothing runs any more, and nothing is received
            self._arrivals()
            while self.away and self.away[0][0] <= self.board.now_s:
                self._end(heapq.heappop(self.away)[2], "cloud")
            while self.edges and self.edges[0] <= self.board.now_s:
                self.edges.pop(0)
            self._decide()
        return Outcome(
            ended=tuple(self.ended),
            unserved=len(self.jobs) - len(self.ended),
            meter=self.board.meter,
            seconds=self.board.now_s,
            battery_j=self.board.battery_j,
            empty_s=self.board.now_s if self.board.battery_j <= 0 else math.inf,
            decisions=self.decisions,
            line=tuple(self.line),
        )

    def _draw_to(self, at_s: float) -> None:
        """Points between this event and the next: a board cools in curves, not in lines."""
        board, after_s = self.board, _DRAWN_S
        watts = board.watts()
        while board.now_s + after_s < at_s:
            warmth = math.nan if board.heat is None else board.heat.after(watts, after_s).now_c
            self.line.append((board.now_s + after_s, warmth, board.battery_j - watts * after_s))
            after_s *= 1.5

    def _next_s(self) -> float:
        board = self.board
        at_s = min(board.next_change_s(), board.empty_at_s(), self.wake_s)
        if self.place < len(self.jobs):
            at_s = min(at_s, self.jobs[self.place].arrives_s)
        elif not (board.rows or self.away or self.waiting):
            return math.inf
        if self.away:
            at_s = min(at_s, self.away[0][0])
        if self.edges:
            at_s = min(at_s, self.edges[0])
        watched = board.heat is not None or self.debt.plan is not None
        if watched and (board.rows or self.waiting):
            at_s = min(at_s, board.now_s + _LOOK_S)
        return max(at_s, board.now_s) if at_s < math.inf else at_s

    def _arrivals(self) -> None:
        now_s, jobs = self.board.now_s, self.jobs
        while self.place < len(jobs) and jobs[self.place].arrives_s <= now_s:
            job = jobs[self.place]
            self.place += 1
            self.waiting[job.id] = job, self._known(job)

    def _known(self, job: Job) -> Waiting:
        if self.setup.clairvoyant:
            mean = p90 = most = float(job.output_tokens)
        else:
            lengths = self._lengths(job)
            mean = lengths.mean_left(most=self.setup.most_output)
            p90 = lengths.left(0.9, most=self.setup.most_output)
            most = lengths.left(1.0, most=self.setup.most_output)
        return Waiting(
            id=job.id,
            prompt_tokens=job.prompt_tokens,
            output_mean=mean,
            output_p90=p90,
            output_most=most,
            arrived_s=job.arrives_s,
            deadline_s=job.deadline_s,
            may_leave=self.setup.cloud is not None and not job.private,
            may_wait=job.background,
        )

    def _lengths(self, job: Job) -> AnswerLengths:
        known = self.lengths.get(job.kind)
        if known is None:
            known = self.lengths[job.kind] = AnswerLengths()
        return known

    def _account(self) -> None:
        board = self.board
        if self.debt.plan is not None:
            worked_j = board.meter.device_j
            seconds = board.now_s - self.accounted_s
            self.debt.spent(
                worked_j - self.worked_j, seconds, now_s=board.now_s, left_j=board.battery_j
            )
            self.worked_j, self.accounted_s = worked_j, board.now_s
        if self.setup.keep_line:
            celsius = math.nan if board.heat is None else board.heat.now_c
            self.line.append((board.now_s, celsius, board.battery_j))

    def _decide(self) -> None:
        board = self.board
        self.decisions += 1
        decision = self.policy.decide(self._state())
        self.wake_s = decision.wake_s if decision.wake_s > board.now_s else math.inf
        if decision.mode != board.mode:
            board.switch(decision.mode)
        for name in decision.start:
            job, _ = self.waiting.pop(name)
            board.start(job)
        for name in decision.offload:
            job, _ = self.waiting.pop(name)
            self._send(job)

    def _state(self) -> PaceState:
        board, setup = self.board, self.setup
        now_s = board.now_s
        rest_k, warming_kw = -math.inf, 0.0
        fastest = None
        if board.heat is not None:
            left_c = board.heat.after(0.0, _FORESIGHT_S).now_c
            rest_k, warming_kw = left_c - setup.soft_c, self.warming_kw
            fastest = self._coolest_cap((setup.hard_c - _HARD_MARGIN_K - left_c) / warming_kw)
        return PaceState(
            now_s=now_s,
            mode=board.mode,
            mode_since_s=board.mode_since_s,
            waiting=[known for _, known in self.waiting.values()],
            running=[self._running(row) for row in board.rows],
            idle_since_s=board.idle_since_s,
            link_up=not any(start <= now_s < end for start, end in setup.outages),
            radio_warm=now_s < self.tail_until_s,
            quiet_until_s=max([end for start, end in setup.quiet if start <= now_s], default=0.0),
            energy_debt_j=self.debt.joules,
            battery_share=board.battery_j / setup.battery_j if setup.battery_j < math.inf else 1.0,
            rest_k=rest_k,
            warming_kw=warming_kw,
            stalled_share=board.stalled_share,
            fastest=fastest,
        )

    def _coolest_cap(self, most_w: float) -> int:
        """The fastest mode that keeps below the hard limit for as long as is looked ahead."""
        cap = 0
        for number, mode in enumerate(self.setup.costs.modes):
            if max(mode.prefill_w, mode.decode_w) <= most_w:
                cap = number
        return cap

    def _running(self, row: Row) -> Running:
        job = row.job
        if self.setup.clairvoyant:
            mean = p90 = most = max(1.0, job.output_tokens - row.given)
        else:
            lengths, given = self._lengths(job), int(row.given)
            mean = lengths.mean_left(given, self.setup.most_output)
            p90 = lengths.left(0.9, given, self.setup.most_output)
            most = lengths.left(1.0, given, self.setup.most_output)
        return Running(
            prefill_tokens=row.prefill_left * job.prompt_tokens,
            output_mean=mean,
            output_p90=p90,
            output_most=most,
            context_tokens=row.context_tokens if self.setup.clairvoyant else job.prompt_tokens,
            deadline_s=job.deadline_s,
            may_wait=job.background,
        )

    def _send(self, job: Job) -> None:
        setup, board = self.setup, self.board
        assert setup.cloud is not None, "nothing may leave without a cloud"
        cloud, radio = setup.cloud, setup.radio
        took_s = cloud.answer_s(radio, job.prompt_tokens, job.output_tokens)
        back_s = _after_outages(board.now_s, took_s, setup.outages)
        begun_s = board.now_s
        shared_s = max(0.0, self.tail_until_s - begun_s)
        self.tail_until_s = max(self.tail_until_s, back_s + radio.tail_s)
        tail = max(0.0, radio.tail_s - shared_s) / radio.tail_s if radio.tail_s else 0.0
        joules = cloud.device_j(radio, job.prompt_tokens, job.output_tokens, tail=tail)
        board.meter.radio_j += joules
        board.battery_j -= joules
        board.meter.cloud_j += cloud.token_j * job.output_tokens
        board.meter.price += cloud.token_price * job.output_tokens
        self.sent += 1
        heapq.heappush(self.away, (back_s, self.sent, job))

    def _end(self, job: Job, route: str) -> None:
        self.ended.append(Ended(job=job, at_s=self.board.now_s, route=route))
        self._lengths(job).observe(job.output_tokens)


def _after_outages(begun_s: float, took_s: float, outages: Sequence[tuple[float, float]]) -> float:
    """When an answer is back that needs `took_s` in all; it goes on when the network is back."""
    back_s = begun_s + took_s
    for start, end in outages:
        if start < back_s and end > begun_s:
            back_s += end - max(start, begun_s)
    return back_s
