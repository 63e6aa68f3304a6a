"""`SamplingToy`: the toy executor choosing tokens itself, as one with a device does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from toyexecutor import ToyExecutor

from tidegate.engine.device_sampling import SampledStep
from tidegate.engine.executor import ExecutorStep, PagedGeometry, SlotGeometry
from tidegate.engine.sampling import Draw, sample


@dataclass(kw_only=True)
class Counted:
    """What was chosen where."""

    drawn: int = 0
    handed_over: int = 0
    """Positions whose logits the host got."""
    masked: int = 0


class SamplingToy(ToyExecutor):
    """See the module. It can draw what `can` says."""

    def __init__(
        self,
        geometry: PagedGeometry | SlotGeometry,
        *,
        can: Callable[[Draw], bool] = lambda draw: True,
    ) -> None:
        super().__init__(geometry)
        self.can = can
        self.counted = Counted()

    def can_draw(self, draw: Draw) -> bool:
        return self.can(draw)

    def execute_and_sample(self, step: ExecutorStep, draws: Sequence[Draw | None]) -> SampledStep:
        logits = self.execute(step).logits
        assert len(logits) == len(draws), "a draw or None for every logit"
        kept = [place for place, draw in enumerate(draws) if draw is not None]
        left = [place for place, draw in enumerate(draws) if draw is None]
        wanted = [draw for draw in draws if draw is not None]
        found = sample(logits[kept], wanted) if wanted else []
        self.counted.drawn += len(kept)
        self.counted.handed_over += len(left)
        self.counted.masked += sum(draw.allowed is not None for draw in wanted)
        return SampledStep(
            tokens=np.array([0 if one is None else one.token for one in found], np.int64),
            sound=np.array([one is not None for one in found], np.bool_),
            logits=logits[left],
        )
