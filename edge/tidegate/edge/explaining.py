"""What would become of a call now, in the terms of whoever decides it: filters, clock, energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from tidegate.edge.answer_memory import Recall
from tidegate.edge.energy.governor import Governor
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.router import CloudSignals, EdgeSignals, RouteRequest, decide, filters


def explanation(
    recall: Recall,
    request: RouteRequest,
    edge: EdgeSignals,
    cloud: CloudSignals,
    governor: Governor | None,
    ask: Ask,
) -> Mapping[str, object]:
    """For JSON; see `tidegate.api.backend.Explaining`.

    Args:
        recall: what is remembered of the call, `why` told even where nothing is.
        request: as the router sees it.
        edge: the device now.
        cloud: the cloud now.
        governor: None: the clock decides.
        ask: as the governor would see it.
    """
    decision = decide(request, edge, cloud)
    route, reason, pace = str(decision.place), decision.reason, None
    if governor is not None and decision.place != "refuse" and not decision.forced:
        pace = governor.explain(ask)
        if pace is not None:
            route, reason = str(pace["route"]), str(pace["reason"])
    if recall.hit is not None:
        route, reason = "cache", recall.why
    return {
        "route": route,
        "reason": reason,
        "filters": asdict(filters(request, edge, cloud)),
        "clock": {
            "edge_s": decision.edge_s,
            "cloud_s": decision.cloud_s,
            "deadline_s": request.deadline_s,
            "reason": decision.reason,
        },
        "pace": pace,
        "state": {
            "prompt_tokens": request.prompt_tokens,
            "running": edge.running,
            "waiting": edge.waiting,
            "rows": edge.batch_rows,
            "cloud": "reachable" if cloud.reachable else cloud.detail,
            "kept_answer": recall.why or "none may be given",
            **({} if governor is None else _energy(governor)),
        },
    }


def _energy(governor: Governor) -> Mapping[str, object]:
    """What of the device's energy a decision depends on."""
    now = governor.view()
    names = ("mode", "mode_reason", "costs", "held", "celsius", "soft_c", "battery", "plan")
    told = now.to_json()
    return {name: told[name] for name in (*names, "debt_j", "quiet")}
