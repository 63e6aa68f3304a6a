"""`Backend`: what stands behind the HTTP surface, be it an engine, a router or a test.

A call's answer is a stream of events: `Routed` first (where it runs and why), then the engine's
text events, then exactly one terminal event. A further `Routed` between texts says that another
place goes on with the same answer. The same events, as JSON, are the payload that
travels over the link; `tidegate.api.wire` turns one into the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from tidegate.api.schema import Call
from tidegate.api.tools import ToolDelta
from tidegate.engine.events import Event

if TYPE_CHECKING:  # the client imports this module, and not what the server is made of
    from tidegate.api.admission import CallSize

Route = Literal["edge", "cloud", "cache"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """Where a call runs. `reason` is one line for people, with the numbers it was decided on."""

    route: Route
    reason: str
    model: str
    request_id: str
    dropped_messages: int = 0
    """Messages, or below tokens of a raw prompt, that were left out to fit the context."""
    dropped_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """One entry of `/v1/models`."""

    id: str
    created_s: int
    context_tokens: int
    state: str | None = None
    """Where models come and go: whether it is in memory now."""
    parent: str | None = None
    """Of an adapter: the model that it adapts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """`healthy` means work makes progress, not just that a process lives."""

    healthy: bool
    ready: bool
    detail: str


AnswerEvent = Routed | ToolDelta | Event


class Backend(Protocol):
    """Serves calls. Every method may be used concurrently from one event loop."""

    def models(self) -> tuple[ModelCard, ...]:
        """The models a call may name; the first is the default."""

    def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        """Answer one call; closing the iterator cancels it.

        Raises:
            RequestError: before the first event, when the call cannot be served as it is.
            CapacityError: before the first event, when there is no room right now.
        """

    def health(self) -> Health:
        """Cheap, and never blocks."""

    async def status(self) -> Mapping[str, object]:
        """JSON for `/status`: queues, memory, routes, link. No secret, no prompt text."""

    def metrics(self) -> bytes:
        """Prometheus text exposition for `/metrics`."""


@runtime_checkable
class Explaining(Protocol):
    """What a backend may offer besides, which chooses where calls run."""

    async def explain(self, call: Call) -> Mapping[str, object]:
        """What would be done with a call now, and by which numbers; runs and changes nothing.

        JSON, but what is closed may cost infinitely much. Keys, as the schema `Explained` has them:
        `route`, `reason`, `filters`, `clock` (`edge_s`, `cloud_s`), `pace` (None, or `mode`,
        `reason` and `terms`: `local_j`, `cloud_j`, `late_local_s`, `late_cloud_s`) and `state`. No
        secret, no prompt text. It knows no `Idempotency-Key`, so an answer that is on its way
        already is none that it tells of.

        Raises:
            RequestError: the call cannot be served as it is.
        """


@runtime_checkable
class Holding(Protocol):
    """What a backend may offer besides, whose models come, go and are replaced."""

    def least_size(self, call: Call) -> CallSize | None:
        """Of a call for a model that is not in memory, no more than its size; None if it is.

        Raises:
            RequestError: there is no such model.
        """

    def hold(self, call: Call) -> AbstractAsyncContextManager[Backend]:
        """A backend for the length of a block: one version of the call's model answers all of it.

        Raises:
            RequestError: there is no such model.
            CapacityError: there is no room for it.
            UnavailableError: it cannot be loaded now.
        """


@runtime_checkable
class Sizing(Protocol):
    """What a backend offers, and what it holds, where keys pay for calls."""

    async def size_of(self, call: Call) -> CallSize:
        """What `call` comes to at most.

        Raises:
            RequestError: there is no such model, or the prompt is empty.
        """
