"""A small `Backend` without a model: it says the last message back, word by word.

Deterministic, as slow as asked, and able to go wrong in every way the contract allows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace

from tidegate.api.admission import CallSize
from tidegate.api.backend import AnswerEvent, Health, ModelCard, Routed
from tidegate.api.schema import Call
from tidegate.engine.events import (
    Cancelled,
    EnergyUse,
    Failed,
    Finished,
    TextDelta,
    Timing,
    Usage,
)


@dataclass(kw_only=True)
class EchoBackend:
    """Answers with the prompt's words. `begun`, `closed` and `calls` are for tests to read."""

    word_s: float = 0.0
    """Pause before every word."""
    repeat: int = 1
    """Says everything so many times."""
    refuse: Exception | None = None
    """Raised before the first event."""
    break_after: int | None = None
    """Words after which `breaking` happens."""
    breaking: Exception | Failed | Cancelled | None = None
    """Raised or yielded at `break_after`; None: the stream just ends, which is a bug."""
    energy: EnergyUse | None = None
    """What every answer says that it took."""
    healthy: bool = True
    ready: bool = True
    begun: int = 0
    closed: int = 0
    """Answers that were closed before their end."""
    ended: int = 0
    calls: list[Call] = field(default_factory=list)

    def models(self) -> tuple[ModelCard, ...]:
        return (ModelCard(id="echo-1", created_s=1_700_000_000, context_tokens=4096),)

    def health(self) -> Health:
        return Health(healthy=self.healthy, ready=self.ready, detail="echoing")

    async def status(self) -> Mapping[str, object]:
        return {"running": self.begun - self.closed - self.ended}

    def metrics(self) -> bytes:
        return b"# HELP echo_up Always 1.\n# TYPE echo_up gauge\necho_up 1.0\n"

    async def size_of(self, call: Call) -> CallSize:
        """Its tokens are words, and it says what it hears."""
        return CallSize(
            model=call.model or "echo-1",
            prompt_tokens=len(_said(call).split(" ")),
            answer_tokens=call.n * min(call.sampling.max_tokens, 4096),
        )

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        if self.refuse is not None:
            raise self.refuse
        self.begun += 1
        self.calls.append(call)
        whole = False
        try:
            words = (_said(call).split(" ") * self.repeat)[: call.sampling.max_tokens]
            yield Routed(
                route="edge", reason="echo: no model", model="echo-1", request_id=f"r{self.begun}"
            )
            for index, word in enumerate(words):
                if index == self.break_after:
                    if isinstance(self.breaking, Exception):
                        raise self.breaking
                    if self.breaking is not None:
                        yield self.breaking
                    return
                await asyncio.sleep(self.word_s)
                yield TextDelta(text=word if index == 0 else f" {word}", tokens=(index,))
            whole = True
            yield replace(_finished(call, len(words)), energy=self.energy)
        finally:
            self.ended += whole
            self.closed += not whole


def _said(call: Call) -> str:
    if call.messages:
        return call.messages[-1].content
    return call.prompt if isinstance(call.prompt, str) else " ".join(map(str, call.prompt or ()))


def _finished(call: Call, words: int) -> Finished:
    return Finished(
        reason="length" if words == call.sampling.max_tokens else "stop",
        usage=Usage(prompt_tokens=len(_said(call).split(" ")), completion_tokens=words),
        timing=Timing(first_scheduled_s=0.0, first_token_s=0.25, total_s=1.25, decode_s=1.0),
    )
