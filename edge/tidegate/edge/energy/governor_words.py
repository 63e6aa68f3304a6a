"""The governor's decisions in words, with the numbers they rest on; a line each.

Joules are named only where the cost model knows watts at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import NEVER, Decision, PaceState, Waiting, heat_of

UNKNOWN = "unknown"
"""Scope of a cost model that knows times only."""


def why_mode(decision: Decision, costs: CostModel) -> str:
    """Why the mode is what it is; PACE's word for its knee is one of joules even without watts."""
    unknown = costs.scope == UNKNOWN and decision.reason == "least joules per token"
    return "the fastest: no watts are known" if unknown else decision.reason


def why_here(one: Waiting, decision: Decision, state: PaceState, costs: CostModel) -> str:
    """Why a request begins on the device."""
    mode = costs.modes[decision.mode]
    rows = min(costs.rows, len(state.running) + len(decision.start)) or 1
    took_s = costs.request_s(decision.mode, one.prompt_tokens, one.output_p90, rows)
    parts = [f"{took_s:.2f} s"]
    if costs.scope != UNKNOWN:
        joules = costs.request_j(decision.mode, one.prompt_tokens, one.output_mean, rows)
        parts.append(f"{joules:.2g} J")
    waited_s = state.now_s - one.arrived_s
    held = f", held {waited_s:.1f} s" if waited_s >= 0.05 else ""
    said = f"here: {' and '.join(parts)} predicted in mode {mode.name}, {_allowed(one, state)}"
    return f"{said}{held} ({why_mode(decision, costs)})"


def why_away(
    one: Waiting, state: PaceState, costs: CostModel, cloud: CloudCost, radio: RadioCost | None
) -> str:
    """Why a request leaves."""
    fastest = costs.fastest if state.fastest is None else state.fastest
    here_s = costs.request_s(fastest, one.prompt_tokens, one.output_p90)
    there_s = cloud.answer_s(radio or RadioCost(), one.prompt_tokens, one.output_p90)
    parts = f"{there_s:.2f} s there, {here_s:.2f} s here alone at the fastest"
    if costs.scope != UNKNOWN:
        here_j = costs.request_j(min(costs.knee, fastest), one.prompt_tokens, one.output_mean)
        owed = f", {state.energy_debt_j:.0f} J owed" if state.energy_debt_j > 0 else ""
        parts += f" for {here_j:.2g} J{owed}"
    queued = f", {len(state.running)} running, {len(state.waiting)} waiting"
    return f"cloud: {parts}{queued}, {_allowed(one, state)}"


def why_held(one: Waiting, state: PaceState, costs: CostModel) -> str:
    """Why a request goes on waiting."""
    if one.may_wait and state.now_s < state.quiet_until_s:
        return f"quiet hours for another {state.quiet_until_s - state.now_s:.0f} s"
    if not one.may_stay and not state.link_up:
        return "the cloud is away, and it cannot run here"
    if len(state.running) >= costs.rows:
        return f"all {costs.rows} rows are taken"
    if any(run.prefill_tokens > 0 for run in state.running):
        return "another's prompt is being computed"
    if one.may_wait:
        return f"background work waits for company, {len(state.waiting)} of {costs.rows} rows"
    return "its prompt would make late what runs, or there may be room before it has to leave"


def explained(
    ask: Ask, pace: Pace, state: PaceState, decision: Decision
) -> Mapping[str, object] | None:
    """PACE's terms of one request that waits in `state`, for JSON; None: it is not there.

    The reason is the one that an answer which is placed now would have.
    """
    terms = next((one for one in decision.terms if one.id == ask.id), None)
    if terms is None:
        return None
    costs, weights = pace.costs, pace.weights
    leaves = ask.id in decision.offload or (
        ask.id not in decision.start and terms.route.startswith("cloud")
    )
    one = next(one for one in state.waiting if one.id == ask.id)
    why = why_mode(decision, costs)
    if ask.id in decision.start:
        reason = why_here(one, decision, state, costs)
    elif ask.id in decision.offload:
        assert pace.cloud is not None, "nothing leaves without a cloud"
        reason = why_away(one, state, costs, pace.cloud, pace.radio)
    else:
        reason = f"held: {why_held(one, state, costs)}; {terms.reason}; mode: {why}"
    return {
        "route": "cloud" if leaves else "edge",
        "begins": ask.id in decision.start + decision.offload,
        "mode": costs.modes[decision.mode].name,
        "mode_reason": why,
        "reason": reason,
        "terms": {
            "local_j": None if costs.scope == UNKNOWN else finite(terms.local_j),
            "cloud_j": finite(terms.cloud_j),
            "late_local_s": finite(terms.late_local_s),
            "late_cloud_s": finite(terms.late_cloud_s),
        },
        "weights": {
            "energy": weights.energy,
            "money": weights.money,
            "late_j_per_s": weights.late_j_per_s,
            "debt_j": weights.debt_j,
            "heat_j_per_kk": weights.heat_j_per_kk,
            "price_j": 0.0 if pace.cloud is None else pace.cloud.token_price,
        },
        "heat_k": round(heat_of(state, costs.modes[decision.mode]), 3),
        "wake_s": finite(decision.wake_s - state.now_s),
    }


def finite(value: float) -> float | None:
    """For JSON, which has no infinity: None."""
    return value if math.isfinite(value) else None


def _allowed(one: Waiting, state: PaceState) -> str:
    if one.deadline_s == NEVER:
        return "no deadline"
    allowed_s = one.deadline_s - state.now_s
    if allowed_s <= 0:
        return f"its deadline was {-allowed_s:.2f} s ago"
    return f"{allowed_s:.2f} s allowed"
