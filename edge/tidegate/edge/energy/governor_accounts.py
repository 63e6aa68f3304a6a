"""`Accounts`: steps and ends of requests, booked where they belong. Nothing here ever raises.

A step goes to the ledger, to the costs that learn, and to what is known of the requests; an end
tells what its request took, as far as anybody knows.
"""

from __future__ import annotations

from collections.abc import Callable

from tidegate.edge.energy.governor_board import BoardWatch
from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_modes import ModeKeeper
from tidegate.edge.energy.governor_requests import Ask, Requests
from tidegate.edge.energy.ledger import RADIO
from tidegate.engine.events import EnergyUse
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport


class Accounts:
    """Of one daemon."""

    def __init__(
        self,
        device: Device,
        requests: Requests,
        modes: ModeKeeper,
        board: BoardWatch,
        *,
        failed: Callable[[str, Exception], None],
        changed: Callable[[], None],
    ) -> None:
        """Book for one device.

        Args:
            device: what is booked for.
            requests: that wait and run.
            modes: for the mode that a step ran in.
            board: that is looked at for what an answer took.
            failed: is told what went wrong instead of the caller.
            changed: is called when a prompt is complete while others wait.
        """
        self._changed = changed
        self._device, self._requests = device, requests
        self._modes, self._board, self._failed = modes, board, failed
        device.ledger.working = lambda: bool(requests.begun)

    def stepped(self, report: StepReport) -> None:
        """The engine's watcher: what it raised would end the step's requests."""
        try:
            mode = self._modes.mode
            self._device.ledger.costs = self._device.costs.costs
            self._device.ledger.stepped(report, mode)
            began_s = report.ended_s - report.elapsed_s
            if not self._modes.switching and began_s >= self._modes.since_s:
                self._device.costs.observe(report, mode)
            else:
                self._device.costs.passed(report)
            rows = max(1, report.decoding_rows)
            context = sum(one.past_tokens for one in report.shares if not one.is_prompt)
            one = self._device.costs.costs.modes[mode]
            complete = self._requests.stepped(report, one.batch_step_s(rows, context))
            if complete and self._requests.held:
                self._changed()
        except Exception as error:  # the boundary of accounting
            self._failed("booking a step", error)

    async def ended_here(self, request_id: str) -> EnergyUse | None:
        """An answer of the device is complete: what it took, as far as that is known."""
        try:
            await self._board.look_after(self._requests.last_step_s(request_id))
            return self._device.ledger.use_of(RequestId(request_id))
        except Exception as error:  # as above
            self._failed("accounting for an answer", error)
            return None

    def ended_away(
        self, ask: Ask, answer_tokens: int, *, took_s: float, decode_s: float
    ) -> EnergyUse | None:
        """An answer of the cloud is complete: what the radio took, as far as that is known.

        What was computed here before it left was told when that ended.

        Args:
            ask: that was answered.
            answer_tokens: of it.
            took_s: from leaving the device to its last token.
            decode_s: of it, from the first token to the last in the cloud.
        """
        cloud = self._device.cloud
        if cloud is None:
            return None
        try:
            cloud.answered(
                prompt_tokens=ask.prompt_tokens,
                output_tokens=answer_tokens,
                took_s=took_s,
                decode_s=decode_s,
            )
            joules = cloud.sent_j(
                prompt_tokens=ask.prompt_tokens,
                output_tokens=answer_tokens,
                now_s=self._device.clock(),
            )
            if not joules:
                return None
            self._device.ledger.sent(RequestId(ask.id), joules)
            return EnergyUse(joules=joules, scope=RADIO, source="estimated")
        except Exception as error:  # as above
            self._failed("accounting for an answer", error)
            return None
