"""What of one step was each request's: its seconds by the cost model, and joules from them.

Rows share what all rows of a step share and bear their own context; tokens of prompts take what
they take alone. The seconds are then scaled to those that the step really took.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidegate.edge.energy.cost import CostModel, ModeCost
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport, StepShare

_LEAST_W: Final = 1e-9
"""By which requests are weighed where no watts above idling are known: by their seconds alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Of one step, for one request."""

    request_id: RequestId
    is_prompt: bool
    seconds: float
    joules: float
    """Above idling, by the cost model."""
    weight: float
    """By which measured joules are divided."""


def split(report: StepReport, costs: CostModel, mode: int) -> tuple[Portion, ...]:
    """The portions of a step that ran in a mode; their seconds are together those of the step."""
    cost, rows = costs.modes[mode], report.decoding_rows
    predicted = [_seconds(share, cost, rows) for share in report.shares]
    total_s = sum(predicted)
    if not total_s > 0 or not report.elapsed_s > 0:
        return ()
    scale = report.elapsed_s / total_s
    portions = []
    for share, seconds in zip(report.shares, predicted, strict=True):
        watts = (cost.prefill_w if share.is_prompt else cost.decode_w) - costs.idle_w
        portions.append(
            Portion(
                request_id=share.request_id,
                is_prompt=share.is_prompt,
                seconds=seconds * scale,
                joules=seconds * scale * watts,
                weight=seconds * scale * max(watts, _LEAST_W),
            )
        )
    return tuple(portions)


def _seconds(share: StepShare, cost: ModeCost, rows: int) -> float:
    if share.is_prompt:
        return share.computed_tokens * cost.prefill_token_s
    return max(1, share.computed_tokens) * cost.share_s(rows, share.past_tokens)
