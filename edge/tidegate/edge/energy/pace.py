"""PACE: when what runs, where, and in which power mode. A pure function of what is known.

Earliest deadline first, of those who can be in time; the power mode is the lowest at or above the
knee of joules per token that meets the deadlines; every request goes where

    V * (system joules + price + lateness) + Z / debt_j * device joules + Y * kelvin

is least, with Z a virtual queue of joules above the battery's plan and Y one of kelvin above the
soft limit (drift plus penalty). The daemon and the simulator call the same `decide`; what they do
with its answer is theirs. Source: energy-and-devices 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Final

from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.edge.energy.pace_order import begins_s, by_deadline, held, hopeful_first
from tidegate.edge.energy.pace_prices import (
    CloudPrices,
    Speed,
    cloud_prices,
    joule_of,
    local_prices,
    speed,
)
from tidegate.edge.energy.pace_state import (
    NEVER,
    Decision,
    PaceState,
    Running,
    Terms,
    Waiting,
    Weights,
    heat_of,
)

_MOST_STALLED: Final = 0.75
_LEAST_WAIT_S: Final = 0.01
"""To the next look: a time that is nearer is now, whatever rounding made of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """The policy with its settings. `decide` has no state of its own."""

    costs: CostModel
    weights: Weights = field(default_factory=Weights)
    radio: RadioCost | None = None
    cloud: CloudCost | None = None
    """None: there is no cloud."""

    def decide(self, state: PaceState, *, explain: bool = False) -> Decision:
        """What to do in `state`; `explain` adds the terms of every request that waits."""
        return _Deciding(self, state, explain=explain).decision()


class _Deciding:
    """One decision: a namespace for what its steps share."""

    def __init__(self, pace: Pace, state: PaceState, *, explain: bool) -> None:
        self.costs, self.weights, self.state = pace.costs, pace.weights, state
        self.explain = explain
        self.fastest = self.costs.fastest if state.fastest is None else state.fastest
        self.knee = min(self.costs.knee, self.fastest)
        self.here = local_prices(state, self.costs, self.weights, self.knee)
        self.there = None
        if pace.cloud is not None and state.link_up and any(one.may_leave for one in state.waiting):
            radio = pace.radio or RadioCost()
            self.there = cloud_prices(state, self.weights, pace.cloud, radio)
        self.losses: dict[str, float] = {}
        """What it costs more that a request leaves, of those that may."""
        self.terms: dict[str, Terms] = {}
        self.speeds: dict[tuple[int, int], Speed] = {}
        self.hopeless = False
        """Whether anybody who waits is late whatever is done."""

    def decision(self) -> Decision:
        """See `Pace.decide`."""
        state = self.state
        if not state.waiting and not state.running:
            mode, wake_s, reason = self._idle(NEVER, "nothing to do")
            wake_s = max(wake_s, state.now_s + _LEAST_WAIT_S)
            return Decision(mode=mode, wake_s=wake_s, reason=reason)
        queue = sorted(state.waiting, key=by_deadline)
        local, offload = self._routes(queue)
        waits, wake_s = held(local, state, self.costs, self.weights, self.knee)
        if waits:
            local = [one for one in local if one.id not in waits]
        if local:
            fast = self._pace(self.fastest, 1)
            local, self.hopeless = hopeful_first(local, fast, state, self.weights)
        local, moved, look_s = self._relieved(local)
        offload += moved
        wake_s = min(wake_s, look_s)
        mode, kept_s, reason = self._mode(local)
        start, begin_s = self._admitted(local, mode)
        wake_s = min(wake_s, begin_s, self._last_leave_s(local, frozenset(start)))
        if not start and not state.running:
            mode, wake_s, reason = self._idle(wake_s, reason)
        else:
            wake_s = min(wake_s, kept_s)
        return Decision(
            mode=mode,
            start=start,
            offload=tuple(offload),
            wake_s=max(wake_s, state.now_s + _LEAST_WAIT_S),
            reason=reason,
            terms=tuple(self.terms.values()),
        )

    def _idle(self, wake_s: float, reason: str) -> tuple[int, float, str]:
        """The mode to idle in, and when to look again."""
        state, idlest = self.state, self.costs.idlest
        if state.mode == idlest:
            return idlest, wake_s, reason
        saved_w = self.costs.modes[state.mode].idle_w - self.costs.idle_w
        even_s = 2 * self.costs.switch_j / saved_w if saved_w > 0 else NEVER
        at_s = max(
            state.idle_since_s + max(even_s, self.weights.idle_after_s),
            state.mode_since_s + self.weights.dwell_s,
        )
        if state.now_s >= at_s:
            return idlest, wake_s, f"idle for {state.now_s - state.idle_since_s:.1f} s"
        return state.mode, min(wake_s, at_s), reason

    # Where each request goes.

    def _routes(self, queue: Sequence[Waiting]) -> tuple[list[Waiting], list[str]]:
        """What stays, in order, and what leaves because that costs less."""
        local: list[Waiting] = []
        offload: list[str] = []
        prices_here = self.here.of_all(queue)
        prices_there = [NEVER] * len(queue)
        if self.there is not None:
            prices_there = self.there.of_all(queue)
        losses = self.losses
        for one, open_here, there in zip(queue, prices_here, prices_there, strict=True):
            here = open_here if one.may_stay else NEVER
            if there < NEVER:
                losses[one.id] = there - here
            leaves = there < here
            if leaves:
                offload.append(one.id)
            elif one.may_stay:
                local.append(one)
            if self.explain:
                self._note(one, here, there, leaves=leaves)
        return local, offload

    def _note(self, one: Waiting, here: float, there: float, *, leaves: bool) -> None:
        if leaves or here < NEVER:
            reason = "it costs less" if min(here, there) < max(here, there) < NEVER else "only way"
            route = "cloud" if leaves else "edge"
        else:
            route, reason = "none", "no way is open: it waits"
        alone_s = self.costs.request_s(self.fastest, one.prompt_tokens, one.output_p90)
        late_there_s = NEVER if self.there is None else self.there.late_s(one)
        self.terms[one.id] = Terms(
            id=one.id,
            route=route,
            local_j=here,
            cloud_j=there,
            late_local_s=max(0.0, self.state.now_s + alone_s - one.deadline_s),
            late_cloud_s=late_there_s if one.may_leave else NEVER,
            reason=reason,
        )

    # Deadlines, and the power mode.

    def _relieved(self, local: list[Waiting]) -> tuple[list[Waiting], list[str], float]:
        """What stays when nothing is late in the fastest mode, what has to leave, and when.

        In order of deadlines, as Moore and Hodgson do: when one would be late, of all up to it the
        one that gains most by leaving is to leave. It does so when the cloud could else be late
        too; until then answers may turn out shorter than feared, and it stay. One that would be
        late even alone leaves at once if that helps; if nothing does, it stays and is late.
        """
        there = self.there
        if there is None or not local:
            return local, [], NEVER
        pace = self._pace(self.fastest, len(local))
        done_s = self._running_done_s(pace)
        leavers: list[tuple[float, int, float]] = []
        gone = dict[int, bool]()
        for place, (one, (work_s, own_s)) in enumerate(zip(local, pace.of_all(local), strict=True)):
            done_s += work_s
            if pace.now_s + own_s > one.deadline_s:
                if one.may_leave and there.late_s(one) < pace.now_s + own_s - one.deadline_s:
                    gone[place] = True
                    done_s -= work_s
                continue
            if one.may_leave:
                heappush(leavers, (self.losses[one.id], place, work_s))
            while done_s > one.deadline_s and leavers:
                _, chosen, freed_s = heappop(leavers)
                gone[chosen] = False
                done_s -= freed_s
        return self._parted(local, gone, there)

    def _parted(
        self, local: list[Waiting], gone: dict[int, bool], there: CloudPrices
    ) -> tuple[list[Waiting], list[str], float]:
        """Those who stay, those who leave now, and when the first of those who wait has to.

        `gone` has the places of those who are to leave, and whether at once.
        """
        if not gone:
            return local, [], NEVER
        moved, wake_s, now_s = list[str](), NEVER, self.state.now_s
        for place in sorted(gone):
            one = local[place]
            spare_s = 0.0 if gone[place] else there.spare_s(one)
            waits = spare_s > _LEAST_WAIT_S
            if waits:
                wake_s = min(wake_s, now_s + spare_s)
            else:
                moved.append(one.id)
            if self.explain:
                route = "cloud, unless there is room soon" if waits else "cloud"
                self.terms[one.id] = replace(self.terms[one.id], route=route, reason="deadlines")
        return [one for place, one in enumerate(local) if place not in gone], moved, wake_s

    def _admitted(self, local: list[Waiting], mode: int) -> tuple[tuple[str, ...], float]:
        """Who begins now: the first in order who makes nobody late that runs, if a row is free.

        One prompt is computed at a time: whoever comes meanwhile may still go before the next. A
        newcomer's prompt stops the answers of others, and its row slows them. One whose own
        deadline leaves it no time, or that has waited for long, begins all the same.

        Returns:
            its name, and when the first of those that are kept back has to begin.
        """
        state = self.state
        if not local or len(state.running) >= self.costs.rows:
            return (), NEVER
        computed = [run for run in state.running if run.prefill_tokens > 0]
        if computed:
            pace = self._pace(state.mode, 0)
            return (), state.now_s + min(pace.rest_s(run) for run in computed)
        bounded = [run for run in state.running if run.deadline_s < NEVER]
        begin_s = NEVER
        for one in local:
            if bounded:
                last_s = self._kept_back_s(one, bounded, mode)
                if last_s > state.now_s + _LEAST_WAIT_S:
                    begin_s = min(begin_s, last_s)
                    continue
            return (one.id,), begin_s
        return (), begin_s

    def _kept_back_s(self, one: Waiting, bounded: list[Running], mode: int) -> float:
        """Until when `one` is kept back for what runs; not after now: it begins.

        Work that may wait begins beside them only in the mode of least joules, in which they must
        be in time with every row in use: it is not worth a faster mode, nor the time that the next
        newcomer will need.
        """
        state, weights = self.state, self.weights
        begins_at_s = state.now_s
        if one.may_wait:
            begins_at_s = begins_s(one, state, self.costs, weights, self.knee)
        patient = state.now_s < begins_at_s
        if patient and (mode > self.knee or self._takes_last_row()):
            return begins_at_s
        pace = self._pace(mode, self.costs.rows) if patient else self._pace(self.fastest, 1)
        begun_s = pace.now_s + pace.prefill_s(one.prompt_tokens)
        if all(begun_s + pace.longest(run) <= run.deadline_s for run in bounded):
            return state.now_s
        last_s = state.now_s + one.deadline_s - begun_s - pace.longest(one)
        return min(last_s, one.arrived_s + weights.longest_hold_s)

    def _takes_last_row(self) -> bool:
        """Whether who begins leaves no row for the next, and those who run cannot wait."""
        running, rows = self.state.running, self.costs.rows
        return len(running) + 1 >= rows and not all(run.may_wait for run in running)

    def _last_leave_s(self, local: list[Waiting], started: frozenset[str]) -> float:
        """When the first of those who wait for a row has to be looked at again to leave in time."""
        if self.there is None:
            return NEVER
        waiting = [one for one in local if one.may_leave and one.id not in started]
        if not waiting:
            return NEVER
        spares_s = [self.there.spare_s(one) for one in waiting]
        return self.state.now_s + min([one for one in spares_s if one > 0], default=NEVER)

    def _mode(self, local: list[Waiting]) -> tuple[int, float, str]:
        """The slowest mode from the knee up that meets all deadlines, else the fastest.

        Returns:
            the mode, until when it may be kept, and why.
        """
        state = self.state
        mode, reason = self.knee, "least joules per token"
        kept_s = state.now_s
        if self.hopeless and mode < self.fastest:
            mode, reason = self.fastest, "the slowest that meets the deadlines"
        else:
            kept_s = self._kept_s(local, mode)
        while mode < self.fastest and kept_s <= state.now_s:
            mode, reason = mode + 1, "the slowest that meets the deadlines"
            kept_s = self._kept_s(local, mode)
        if mode == self.knee and heat_of(state, self.costs.modes[mode]) > 0:
            mode, reason = self._cooler(local)
            kept_s = self._kept_s(local, mode)
        until_s = state.mode_since_s + self.weights.dwell_s
        if mode != state.mode <= self.fastest and state.now_s < until_s:
            here_s = NEVER
            if state.mode < self.fastest:
                here_s = self._kept_s(local, state.mode)
            # Up from the idlest mode, or for a deadline: at once.
            if mode < state.mode or (state.running and here_s > state.now_s):
                wake_s = until_s if here_s <= state.now_s else min(until_s, here_s)
                return state.mode, wake_s, f"stays until {until_s:.1f} s, not to flap"
        if mode == self.fastest:
            kept_s = NEVER  # there is none to go on in, late or not
        if mode > self.knee:
            kept_s = min(kept_s, max(until_s, state.now_s + self.weights.dwell_s))
        return mode, kept_s, reason

    def _cooler(self, local: list[Waiting]) -> tuple[int, str]:
        """A mode below the knee while it is hot, as far as deadlines allow."""
        weights, state = self.weights, self.state
        best, least, joule = self.knee, NEVER, joule_of(state, weights)
        for candidate in range(self.knee, -1, -1):
            if candidate < self.knee and self._kept_s(local, candidate) <= state.now_s:
                break
            watts = self.costs.modes[candidate].decode_w - self.costs.idle_w
            score = joule * self.costs.token_j(candidate)
            heat_k = heat_of(state, self.costs.modes[candidate])
            score += weights.heat_j_per_kk * heat_k * state.warming_kw * watts
            if score < least:
                best, least = candidate, score
        return best, "it is hot" if best < self.knee else "least joules per token"

    def _kept_s(self, local: Sequence[Waiting], mode: int) -> float:
        """Until when `mode` may be kept with all deadlines met; not after now: not at all.

        Work is done in order with full sharing of steps, and nobody ends before what its own tokens
        take: exact for one row, and what the device reaches with several. What runs, or is about
        to, may turn out longer than nine in ten do: then the fastest mode has to come in time.
        """
        state, now_s = self.state, self.state.now_s
        pace = self._pace(mode, len(local))
        done_s = pace.now_s
        for run in state.running:
            work_s, own_s = pace.of_running(run)
            done_s += work_s
            if pace.now_s + own_s > run.deadline_s:
                return now_s
        if not pace.in_time(local, done_s):
            return now_s
        if mode == self.fastest:
            return NEVER
        fast = self._pace(self.fastest, self.costs.rows)  # others may come
        stalls = 1 / (1 - min(state.stalled_share, _MOST_STALLED))
        room = max(0, self.costs.rows - len(state.running))
        bounded: list[Running | Waiting] = [*state.running, *local[:room]]
        spare_s = [one.deadline_s - fast.now_s - stalls * fast.longest(one) for one in bounded]
        # A second in `mode` takes so much longer than it would have in the fastest.
        lost = 1.0 - fast.step_s / self._pace(mode, self.costs.rows).step_s
        least_s = min(spare_s, default=NEVER)
        if lost <= 0:  # it is as fast as the fastest
            return NEVER if least_s > 0 else now_s
        return now_s + least_s / lost

    def _running_done_s(self, pace: Speed) -> float:
        return pace.now_s + sum([pace.of_running(run)[0] for run in self.state.running])

    def _pace(self, mode: int, waiting: int) -> Speed:
        key = mode, min(self.costs.rows, len(self.state.running) + waiting)
        known = self.speeds.get(key)
        if known is None:
            known = speed(self.state, self.costs, self.weights, mode, waiting)
            self.speeds[key] = known
        return known
