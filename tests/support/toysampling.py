"""`SamplingToy`: the toy executor choosing tokens itself, as one with a device does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from toyexecutor import ToyExecutor

from tidegate.engine.device_sampling import SampledStep
from tidegate.engine.executor import ExecutorStep, PagedGeometry, Row, SlotGeometry
from tidegate.engine.sampling import Draw, sample
from tidegate.errors import ExecutionError


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


class PipelinedToy(SamplingToy):
    """One that takes a step while the one before is pending; tokens are fed inside it."""

    def __init__(self, geometry: PagedGeometry | SlotGeometry) -> None:
        super().__init__(geometry)
        self.most_pending = self.submitted = self.fed = self._pending = 0
        self._last: SampledStep | None = None

    def submit(self, step: ExecutorStep, draws: Sequence[Draw]) -> PendingToy:
        self.submitted += 1
        self._pending += 1
        self.most_pending = max(self.most_pending, self._pending)
        assert self._pending <= 2
        for draw in draws:
            assert draw.allowed is None
            assert draw.history is None
        rows = tuple(self._fed(row) for row in step.rows)
        try:
            self._last = self.execute_and_sample(replace(step, rows=rows), draws)
            return PendingToy(self._landed, self._last, None)
        except ExecutionError as error:
            self._last = None
            return PendingToy(self._landed, None, error)

    def _fed(self, row: Row) -> Row:
        if row.fed is None:
            return row
        self.fed += 1
        # Behind a step that failed there is nothing to be fed with, and nobody looks.
        token = 0 if self._last is None else self._last.tokens[row.fed]
        return replace(row, tokens=np.append(row.tokens[:-1], token), fed=None)

    def _landed(self) -> None:
        self._pending -= 1


@dataclass(frozen=True, slots=True)
class PendingToy:
    """A step that has run, and whose end nobody has seen yet."""

    landed: Callable[[], None]
    found: SampledStep | None
    error: ExecutionError | None

    def result(self) -> SampledStep:
        self.landed()
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found
