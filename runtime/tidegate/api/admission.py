"""What an HTTP surface asks of whoever keeps its API keys: who comes, what it may, what it used.

Every request is a `Visit`: it knocks at the door, a call asks to be admitted with what it may use
at most, its tokens are tallied as they come, and it leaves exactly once, however it ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol

from starlette.responses import JSONResponse
from starlette.types import Scope

from tidegate.engine.events import Cancelled, Failed, Finished, TextDelta, Usage
from tidegate.errors import CapacityError, RequestError, UnavailableError

if TYPE_CHECKING:  # `backend` imports this module
    from tidegate.api.backend import AnswerEvent

_VISIT: Final = "tidegate.visit"

Outcome = Literal["none", "ok", "aborted", "failed"]
"""`none`: nothing was answered. `aborted`: the client left, or the service was stopped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Knock:
    """One request as it arrives."""

    method: str
    path: str
    key: str | None = field(repr=False)
    """The bearer token, if there is one."""
    source: str
    """The client's address."""
    client: str | None = None
    """The name of the certificate that it showed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSize:
    """Which model a call is for; tokens of its prompt, and of all its answers at most."""

    model: str
    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Of both."""
        return self.prompt_tokens + self.answer_tokens


class ChoiceTally:
    """Tokens of one answer, counted while it runs and replaced by its usage when it ends."""

    def __init__(self) -> None:
        self.outcome: Outcome = "none"
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    def see(self, event: AnswerEvent) -> None:
        """Count one event."""
        match event:
            case TextDelta():
                so_far = self.usage.completion_tokens + len(event.tokens)
                self.usage = Usage(prompt_tokens=0, completion_tokens=so_far)
            case Finished():
                self.outcome, self.usage = "ok", event.usage
            case Cancelled():
                self.outcome, self.usage = "aborted", event.usage
            case Failed():
                self.failed()
            case _:
                self.outcome = "aborted"  # until an end is seen

    def failed(self) -> None:
        """It raised or said so; a failure before anything was answered leaves no trace."""
        if self.outcome != "none":
            self.outcome = "failed"


class Tally:
    """What the answers of one call used together."""

    def __init__(self) -> None:
        self._choices: list[ChoiceTally] = []
        self._reading: Outcome | None = None
        self._read_tokens = 0

    def choice(self) -> ChoiceTally:
        """Begin to count one more answer."""
        made = ChoiceTally()
        self._choices.append(made)
        return made

    def begin_reading(self) -> None:
        """Work for a call that writes nothing begins: from now on it is paid, however it ends."""
        self._reading = "aborted"  # until an end is seen

    def counted(self, tokens: int) -> None:
        """It has so many tokens to read: what a client that leaves pays for."""
        self._read_tokens = tokens

    def read_only(self, tokens: int) -> None:
        """The call is answered: it read so many tokens, maybe none, and wrote none."""
        self._reading, self._read_tokens = "ok", tokens

    def reading_failed(self, error: Exception) -> None:
        """It raised `error`. Refusals come before the work: they leave no trace."""
        if self._reading is not None:
            refused = isinstance(error, CapacityError | RequestError | UnavailableError)
            self._reading = None if refused else "failed"

    @property
    def outcome(self) -> Outcome:
        """Of the whole call: `ok` only if every answer is whole."""
        if self._reading is not None:
            return self._reading
        found = {choice.outcome for choice in self._choices} or {"none"}
        order: tuple[Outcome, ...] = ("failed", "aborted", "none", "ok")
        return next(outcome for outcome in order if outcome in found)

    @property
    def usage(self) -> Usage:
        """The prompt counts once; 0 of it when no answer lived to tell its length."""
        used = [choice.usage for choice in self._choices]
        told = max(used, key=lambda usage: usage.prompt_tokens, default=None)
        return Usage(
            prompt_tokens=self._read_tokens if told is None else told.prompt_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in used),
            cached_tokens=used[0].cached_tokens if used else 0,
        )


class Visit(Protocol):
    """One request. Used by one task."""

    @property
    def refusal(self) -> JSONResponse | None:
        """The answer to a caller who may not come in; None lets it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What the answer's head says of the caller's limits."""

    @property
    def tally(self) -> Tally:
        """Filled while the call is answered."""

    def may_use(self, model: str) -> bool:
        """Whether its key may name this model; others are not shown to it."""

    async def expect(self, least: CallSize) -> None:
        """Refuse a call that would not be admitted, before its model is brought for it.

        Nothing is reserved.

        Args:
            least: a size that the call's own is not below.

        Raises:
            AccessError: the key may not use this model.
            RequestError: the call is larger than what the key may ever use at once.
            LimitError: the key has used up a rate or a quota.
            UnavailableError: whoever keeps account cannot be reached.
        """

    async def admit(self, size: CallSize) -> None:
        """Reserve what a call may use at most; raises what `expect` does."""

    async def admit_tokens(self, tokens: int, model: str) -> None:
        """Reserve so many prompt tokens; raises what `admit` does."""

    def leave(self, status: int, request_id: str) -> None:
        """It is over: 0 for a request without an answer. What was not used is given back."""


class Admission(Protocol):
    """Keeps account of visits. See `HttpSettings.admission`."""

    def knock(self, knock: Knock) -> Visit:
        """Never raises: who may not come in gets a visit with a refusal."""


def keep_visit(scope: Scope, visit: Visit) -> None:
    """For `visit_of`."""
    scope[_VISIT] = visit


def visit_of(scope: Scope) -> Visit | None:
    """The visit that this request is; None where nobody keeps account."""
    visit: Visit | None = scope.get(_VISIT)
    return visit
