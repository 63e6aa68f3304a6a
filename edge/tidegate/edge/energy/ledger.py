"""`EnergyLedger`: which request took which joules, of those drawn and of those the costs predict.

Between two samples of a sensor, the joules above idling go to the requests that worked then, by
what the cost model says their tokens take; the rest is idling's. A request is told as measured only
if all of it was. Otherwise the whole of it is told from the cost model: seconds that its steps took
times watts above idling. Totals add up to what was drawn, apart by scope and by how it is known.

Steps run one after the other, and the panel's clock is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.ledger_split import Portion, split
from tidegate.edge.energy.ledger_windows import Account, IdleWatts, Part, Window
from tidegate.edge.energy.sensors.sample import Panel, Sample, drawn_between
from tidegate.engine.events import EnergyUse
from tidegate.engine.steps import StepReport

TotalKey = tuple[str, str, str]
"""Scope, source, and the route: edge, cloud or idle."""

RADIO: Final = "radio"
"""Scope of what sending takes, which is estimated."""
UNKNOWN: Final = "unknown"
"""Scope of costs without watts: they predict no joules."""
_LATE_S: Final = 30.0
"""A window waits so long for steps that lie in it while no request is known to run."""
_LONGEST_STEP_S: Final = 900.0
"""And so long while one does: a prompt of some thousand tokens on a small board takes minutes."""
_SLACK_S: Final = 1e-3
"""Between a step and its report: one that is covered but for this, or a tenth of it, is covered."""
_MOST_REQUESTS: Final = 4096
_MOST_AHEAD: Final = 8192
"""Steps since the last sample: a minute and more of them, for a daemon that samples each second."""


class EnergyLedger:
    """Books joules. To be used on one thread, the event loop's.

    Args:
        costs: of the board; may be replaced by corrected ones of the same modes and scope.
        panel: is told what was worked.
        clock: of the panel and the engine.
    """

    def __init__(self, costs: CostModel, panel: Panel, clock: Callable[[], float]) -> None:
        self.costs = costs
        self.working: Callable[[], bool] = _nobody
        """Whether a request runs, of which a step may be under way; the owner's to set."""
        self._panel = panel
        self._accounts: dict[str, Account] = {}
        self._open: list[Window] = []
        self._ahead: list[Part] = []
        self._last: Sample | None = None
        self._settled_s = self._reported_s = clock()
        self._idle = IdleWatts()
        self._totals: dict[TotalKey, float] = {}

    def stepped(self, report: StepReport, mode: int) -> None:
        """Book a step that ran in a mode, by its index among those of the costs."""
        portions = split(report, self.costs, mode)
        self._reported_s = max(self._reported_s, report.ended_s)
        if portions:
            joules = sum(one.joules for one in portions)
            self._panel.worked(seconds=report.elapsed_s, joules=joules)
            part = Part(
                begins_s=report.ended_s - report.elapsed_s,
                ends_s=report.ended_s,
                whole_s=report.elapsed_s,
                shares=tuple((self._worked(one), one.weight, one.joules) for one in portions),
            )
            self._place(part)
        self._close_reported()

    def sent(self, request_id: str, joules: float) -> None:
        """Book what the radio took to send a request away and to get its answer."""
        self._account(request_id).radio_j += joules
        self._add((RADIO, "estimated", "cloud"), joules)

    def settle(self, sample: Sample) -> None:
        """Book what was drawn since the last sample."""
        if sample.at_s <= self._settled_s:
            return
        begins_s, self._settled_s = self._settled_s, sample.at_s
        before, self._last = self._last, sample
        drawn_j = None if before is None else drawn_between(before, sample)
        if drawn_j is not None and sample.kind == "measured":
            window = Window(
                begins_s=begins_s,
                ends_s=sample.at_s,
                joules=drawn_j,
                scope=sample.scope,
                idle=not self.working(),
            )
            self._open.append(window)
        else:
            idle_j = self.costs.idle_w * (sample.at_s - begins_s)
            self._add((self.costs.scope, self._source, "idle"), idle_j)
        parts, self._ahead = self._ahead, []
        for part in parts:
            for account, _, _ in part.shares:
                account.ahead -= 1
            self._place(part)
        self._close_reported()

    def use_of(self, request_id: str) -> EnergyUse | None:
        """What a request took; None where nothing can be told.

        Measured only if a sample was settled after its last step: see `unsettled`. For a request
        that was begun here and sent away, what it took here without the radio.
        """
        account = self._accounts.get(request_id)
        if account is None or account.partial:
            return None
        self._close_until(self._reported_s)
        if account.worked and account.scope and not account.unmeasured and not account.ahead:
            return EnergyUse(joules=account.measured_j, scope=account.scope, source="measured")
        if account.worked and self.costs.scope != UNKNOWN:
            scope = self.costs.scope
            return EnergyUse(joules=account.model_j, scope=scope, source=self._source)
        if account.radio_j and not account.worked:
            return EnergyUse(joules=account.radio_j, scope=RADIO, source="estimated")
        return None

    def unsettled(self, request_id: str) -> bool:
        """Whether it worked since the last sample, so that one more would measure the rest."""
        account = self._accounts.get(request_id)
        return account is not None and account.ahead > 0

    def forget(self, request_id: str) -> None:
        """It has ended and was told. Totals keep what it took."""
        self._accounts.pop(request_id, None)

    def totals(self) -> Mapping[TotalKey, float]:
        """Joules by scope, source and route; never less than before."""
        return dict(self._totals)

    @property
    def open_j(self) -> float:
        """Measured joules that wait for steps to be reported and are in no total yet."""
        return sum(one.joules for one in self._open)

    @property
    def _source(self) -> Literal["calibrated", "estimated"]:
        return "estimated" if self.costs.source == "estimated" else "calibrated"

    def _add(self, key: TotalKey, joules: float) -> None:
        if key[0] != UNKNOWN:
            self._totals[key] = self._totals.get(key, 0.0) + joules

    def _account(self, request_id: str) -> Account:
        account = self._accounts.get(request_id)
        if account is None:
            while len(self._accounts) >= _MOST_REQUESTS:
                del self._accounts[next(iter(self._accounts))]
            account = self._accounts[request_id] = Account(id=request_id)
        return account

    def _worked(self, portion: Portion) -> Account:
        account = self._account(portion.request_id)
        if not account.worked:
            # A request begins with its prompt: this one's account was dropped for its age.
            account.partial = not portion.is_prompt
        account.worked = True
        account.model_j += portion.joules
        return account

    def _place(self, part: Part) -> None:
        """Weigh a part in the windows where it lies; what comes after the last sample waits."""
        covered_s = sum(window.take(part) for window in self._open)
        later_s = part.overlap_s(self._settled_s, part.ends_s)
        if later_s > 0:
            self._wait(part, later_s)
        missing_s = part.ends_s - part.begins_s - covered_s - later_s
        if missing_s > min(_SLACK_S, part.whole_s / 10):
            self._miss(part, missing_s)

    def _wait(self, part: Part, later_s: float) -> None:
        if len(self._ahead) >= _MOST_AHEAD:
            dropped, self._ahead = self._ahead, []
            for one in dropped:
                for account, _, _ in one.shares:
                    account.ahead -= 1
                self._miss(one, one.ends_s - one.begins_s)
        begins_s = max(part.begins_s, part.ends_s - later_s)
        self._ahead.append(
            Part(begins_s=begins_s, ends_s=part.ends_s, whole_s=part.whole_s, shares=part.shares)
        )
        for account, _, _ in part.shares:
            account.ahead += 1

    def _miss(self, part: Part, missing_s: float) -> None:
        """Some of a step was while nothing was measured."""
        for account, _, joules in part.shares:
            account.unmeasured = True
            share_j = joules * missing_s / part.whole_s
            self._add((self.costs.scope, self._source, "edge"), share_j)

    def _close_reported(self) -> None:
        """Close the windows in which no step can lie that was not reported."""
        late_s = self._settled_s - (_LONGEST_STEP_S if self.working() else _LATE_S)
        while self._open and self._open[0].ends_s <= max(self._reported_s, late_s):
            self._close(self._open.pop(0))

    def _close_until(self, at_s: float) -> None:
        while self._open and self._open[0].begins_s < at_s:
            window = self._open.pop(0)
            if window.ends_s > at_s:
                self._open.insert(0, window.cut(at_s))
            self._close(window)

    def _close(self, window: Window) -> None:
        """Divide its joules between those who worked and idling."""
        idle_w, above_j = self._idle_w(window.scope), 0.0
        if not window.weights:
            if window.idle:
                self._idle.seen(window.scope, window.joules / window.seconds, window.seconds)
        elif idle_w is None:
            for account in window.weights:
                account.unmeasured = True
        else:
            above_j = max(0.0, window.joules - idle_w * window.seconds)
            for account, joules in window.divided(above_j):
                account.unmeasured |= account.scope not in (None, window.scope)
                account.scope = window.scope
                account.measured_j += joules
        self._add((window.scope, "measured", "edge"), above_j)
        self._add((window.scope, "measured", "idle"), window.joules - above_j)

    def _idle_w(self, scope: str) -> float | None:
        """What idling takes of a scope, as calibrated or as seen; what is assumed is no measure."""
        if self.costs.scope == scope and self._source == "calibrated":
            return self.costs.idle_w
        return self._idle.of(scope)


def _nobody() -> bool:
    return False
