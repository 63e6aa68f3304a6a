"""`Governed`: the governor as the device's backend meets it, and the same without one.

Without a governor nothing is placed, booked or told, and the clock alone decides as it always did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tidegate.api.schema import Call
from tidegate.edge.answer_memory import Recall
from tidegate.edge.energy.governor import Governor
from tidegate.edge.energy.governor_line import Placement
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.energy.metrics import render_energy
from tidegate.edge.energy.pace_state import NEVER
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished
from tidegate.engine.request import Priority, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A call on its way: its prompt as tokens, its id, and what is remembered of it."""

    call: Call
    prompt: tuple[int, ...] = field(repr=False)
    request_id: str
    recall: Recall
    answer_tokens: float
    """Expected length of the answer."""
    sampling: SamplingParams
    """Fitted to the device's context."""
    arrived_s: float
    """On the engine's clock."""

    @property
    def may_wait(self) -> bool:
        """Its caller said that it is background work."""
        return self.call.options.priority is Priority.BACKGROUND

    def ask(self, *, may_leave: bool = False) -> Ask:
        """What the governor is asked; it never learns a word of the prompt."""
        options, sampling = self.call.options, self.sampling
        deadline_ms, priority = options.deadline_ms, options.priority
        return Ask(
            id=self.request_id,
            kind=f"{self.call.kind} {priority.name.lower()}",
            prompt_tokens=len(self.prompt),
            most_tokens=sampling.max_tokens,
            deadline_s=NEVER if deadline_ms is None else self.arrived_s + deadline_ms / 1000,
            may_leave=may_leave,
            may_wait=self.may_wait,
            exact=sampling.ignore_eos and not (sampling.stop or sampling.stop_token_ids),
        )


class Governed:
    """Passes on what happens to requests, where there is a governor."""

    def __init__(self, governor: Governor | None) -> None:
        """Schedule by `governor`, or by nothing."""
        self.governor = governor

    @property
    def decides(self) -> bool:
        """Whether there is one."""
        return self.governor is not None

    def held_before(self, work: Work) -> int:
        """Requests in the governor's line that count for this one."""
        if self.governor is None:
            return 0
        return self.governor.held_before(may_wait=work.may_wait)

    def see_link(self, up: bool) -> None:
        """The cloud can be reached, or not."""
        if self.governor is not None:
            self.governor.see_link(up)

    @contextmanager
    def serving(self, work: Work) -> Iterator[None]:
        """Around a request, however it ends."""
        try:
            yield
        finally:
            if self.governor is not None:
                self.governor.end(work.request_id)

    async def place(self, work: Work, *, may_leave: bool) -> Placement | None:
        """See `Governor.place`."""
        assert self.governor is not None, "asked only where there is one"
        return await self.governor.place(work.ask(may_leave=may_leave))

    def begin(self, work: Work) -> None:
        """It runs on the device, whoever decided so."""
        if self.governor is not None:
            self.governor.begin(work.ask())

    def depart(self, work: Work) -> None:
        """It goes to the cloud, whoever decided so."""
        if self.governor is not None:
            self.governor.depart(work.request_id)

    def learn(self, work: Work, end: Finished) -> None:
        """How long a whole answer was."""
        if self.governor is not None:
            self.governor.requests.learn(work.ask(), end.usage.completion_tokens)

    async def ended_here(self, work: Work, end: Finished) -> Finished:
        """The end of what the device computed, with what it took where that is known."""
        if self.governor is None:
            return end
        try:
            use = await self.governor.accounts.ended_here(work.request_id)
        finally:
            # What follows, in the cloud or at a slow reader, takes no row of this device.
            self.governor.depart(work.request_id)
        return replace(end, energy=use)

    def ended_away(self, work: Work, end: Finished, *, sent_tokens: int | None = None) -> Finished:
        """The end of what the cloud computed: what the radio took, never what it took there.

        `sent_tokens` are those of the prompt that was sent, where it was not the call's own.
        """
        if self.governor is None:
            return replace(end, energy=None)
        ask = work.ask()
        if sent_tokens is not None:
            ask = replace(ask, prompt_tokens=sent_tokens)
        energy = self.governor.accounts.ended_away(
            ask,
            end.usage.completion_tokens,
            took_s=end.timing.total_s,
            decode_s=end.timing.decode_s,
        )
        return replace(end, energy=energy)

    def status(self) -> Mapping[str, object] | None:
        """For `/status`."""
        return None if self.governor is None else self.governor.view().to_json()

    def metrics(self) -> bytes:
        """For `/metrics`."""
        return b"" if self.governor is None else render_energy(self.governor.view())


@dataclass(frozen=True, kw_only=True, slots=True)
class GovernedEngine:
    """An engine and the line before it, as `tidegate.api.lifecycle.Serving`."""

    engine: Engine
    governor: Governor

    async def run(self) -> None:
        """See `Engine.run`."""
        await self.engine.run()

    async def drain(self, timeout_s: float) -> bool:
        """See `Engine.drain`; who waits in the line is refused like who waits in the engine's."""
        self.governor.close_line()
        return await self.engine.drain(timeout_s)
