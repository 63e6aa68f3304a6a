"""Decisions as lines of JSON: everything that one depended on, so that it can be made again.

A line is either what changed of the policy (`costs`, `weights`, `radio`, `cloud`) or one state with
the decision that it led to. No text of a prompt is in either. Numbers come back exactly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidegate.edge.energy.cost import CloudCost, CostModel, ModeCost, RadioCost
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import Decision, PaceState, Running, Waiting, Weights

_log = logging.getLogger(__name__)

_DERIVED = ("knee", "idle_w", "idlest")
"""Of a cost model, from its modes."""


class DecisionLog:
    """Writes a file as decisions are made, for as long as that succeeds."""

    def __init__(self, path: Path) -> None:
        """Begin the file anew.

        Raises:
            OSError: it cannot be written.
        """
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._pace: Pace | None = None
        self._broken = False

    def __call__(self, pace: Pace, state: PaceState, decision: Decision) -> None:
        """Write one decision, and before it what it was made by if that is new."""
        if self._broken:
            return
        try:
            if pace != self._pace:
                self._pace = pace
                self._file.write(json.dumps(_policy(pace)) + "\n")
            told = asdict(decision)
            del told["terms"]
            self._file.write(json.dumps({"state": asdict(state), "decision": told}) + "\n")
        except (OSError, ValueError) as error:
            self._broken = True
            _log.warning("energy: decisions are not written any more: %s", error)

    def close(self) -> None:
        """End the file."""
        self._file.close()


def read_decisions(path: Path) -> Iterator[tuple[Pace, PaceState, Decision]]:
    """What a `DecisionLog` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is no such file.
    """
    pace: Pace | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        if "costs" in told:
            pace = _pace(told)
            continue
        if pace is None:
            raise ValueError("a decision before its policy")
        yield pace, _state(told["state"]), _decision(told["decision"])


def _policy(pace: Pace) -> dict[str, Any]:
    costs = asdict(pace.costs)
    for name in _DERIVED:
        del costs[name]
    return {
        "costs": costs,
        "weights": asdict(pace.weights),
        "radio": None if pace.radio is None else asdict(pace.radio),
        "cloud": None if pace.cloud is None else asdict(pace.cloud),
    }


def _pace(told: dict[str, Any]) -> Pace:
    modes = tuple(ModeCost(**one) for one in told["costs"].pop("modes"))
    radio, cloud = told["radio"], told["cloud"]
    return Pace(
        costs=CostModel(modes=modes, **told["costs"]),
        weights=Weights(**told["weights"]),
        radio=None if radio is None else RadioCost(**radio),
        cloud=None if cloud is None else CloudCost(**cloud),
    )


def _state(told: dict[str, Any]) -> PaceState:
    waiting = [Waiting(**one) for one in told.pop("waiting")]
    running = [Running(**one) for one in told.pop("running")]
    return PaceState(waiting=waiting, running=running, **told)


def _decision(told: dict[str, Any]) -> Decision:
    start, offload = tuple(told.pop("start")), tuple(told.pop("offload"))
    return Decision(start=start, offload=offload, **told)
