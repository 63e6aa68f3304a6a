"""In which order requests go, and which of them wait on purpose: what PACE settles before modes.

Earliest deadline first, but those who cannot be in time any more go behind those who can: under
load, first come by deadline alone makes everybody a little late. Those without a deadline are last.
Work that may wait is held while the device is idle, until there is enough of it for full steps or a
share of its slack is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.pace_prices import Speed
from tidegate.edge.energy.pace_state import NEVER, PaceState, Waiting, Weights

by_deadline = attrgetter("deadline_s", "may_wait", "arrived_s")
"""The key of earliest deadline first.

Of those with the same or none, background work is last: nobody waits for it."""


def hopeful_first(
    queue: Sequence[Waiting], fast: Speed, state: PaceState, weights: Weights
) -> tuple[list[Waiting], bool]:
    """Who may still be in time, in order; then who is late whatever is done; then all others.

    The others have no deadline and lose nothing by the wait, whereas each second makes the late
    later. One that has waited for as long as anything is held goes in its own order: none starves.

    Args:
        queue: in order of deadlines.
        fast: the fastest mode with a row to oneself.
        state: for the time.
        weights: for how long anything waits.

    Returns:
        the order, and whether anybody is late whatever is done.
    """
    hopeless = fast.hopeless(queue)
    if not hopeless:
        return list(queue), False
    oldest_s = state.now_s - weights.longest_hold_s
    late = [one for one in hopeless if one.arrived_s > oldest_s]
    behind = {one.id for one in late}
    rest = [one for one in queue if one.id not in behind]
    hopeful = [one for one in rest if one.deadline_s < NEVER]
    return hopeful + late + rest[len(hopeful) :], True


def held(
    local: Sequence[Waiting], state: PaceState, costs: CostModel, weights: Weights, knee: int
) -> tuple[set[str], float]:
    """Work that may wait and gains by it, and when the first of it has to begin.

    It waits while the device is idle, until there is enough of it for full steps or until its
    share of the slack is gone; beside what runs anyway it rides along.
    """
    may = [one for one in local if one.may_wait]
    if not may:
        return set(), NEVER
    quiet = state.now_s < state.quiet_until_s
    company = bool(state.running) or len(may) < len(local)
    if not quiet and (company or len(may) >= costs.rows):
        return set(), NEVER
    waits, wake_s = set[str](), NEVER
    for one in may:
        at_s = begins_s(one, state, costs, weights, knee)
        if at_s > state.now_s:
            waits.add(one.id)
            wake_s = min(wake_s, at_s)
    if len(waits) < len(may) and not quiet:
        return set(), NEVER  # one has to begin: the others ride along
    return waits, wake_s


def begins_s(
    one: Waiting, state: PaceState, costs: CostModel, weights: Weights, knee: int
) -> float:
    """When work that may wait has to begin at the latest."""
    if one.deadline_s == NEVER:
        quiet = state.now_s < state.quiet_until_s
        return state.quiet_until_s if quiet else one.arrived_s + weights.longest_hold_s
    took_s = costs.request_s(knee, one.prompt_tokens, one.output_p90, costs.rows)
    last_s = one.deadline_s - took_s - weights.margin_s
    if state.now_s < state.quiet_until_s:
        return min(state.quiet_until_s, last_s)
    share = 1.0 if state.energy_debt_j > 0 else weights.hold_share
    slack_s = min(share * max(0.0, last_s - one.arrived_s), weights.longest_hold_s)
    return one.arrived_s + slack_s
