"""What both clients return: typed results, texts and errors read from bytes; no I/O.

What comes is another machine's: a reader here raises `UnavailableError` for anything that is not
the answer of an OpenAI-compatible server, such as a proxy's page. A server without the `tidegate`
object is fine; the route is then None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar, cast, get_args

from tidegate.api.backend import ModelCard, Route
from tidegate.api.sse import Decoder
from tidegate.api.wire import parse_json
from tidegate.client.likelihoods import Likelihood, read_likelihoods
from tidegate.engine.events import EnergySource, EnergyUse, FinishReason, Usage
from tidegate.errors import (
    CapacityError,
    ExecutionError,
    IdentityError,
    RequestError,
    TidegateError,
    UnavailableError,
)

_T = TypeVar("_T")
_Json = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds since the request reached the engine, and decoded tokens per second after the first.

    None where the server did not say, or there was no second token to time.
    """

    ttft_s: float | None = None
    total_s: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of the answers to a call."""

    text: str
    finish_reason: FinishReason
    logprobs: tuple[Likelihood, ...] = ()
    """Per token, when they were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A complete answer. `route` says where it ran and `reason` why, in one line for people."""

    choices: tuple[Choice, ...]
    """As many as `n` asked for; `text`, `finish_reason` and `logprobs` are the first one's."""
    model: str
    usage: Usage
    route: Route | None
    reason: str
    request_id: str
    timings: Timings
    dropped_messages: int = 0
    """Messages, or below tokens of a raw prompt, that were left out to fit the context."""
    dropped_tokens: int = 0
    energy: EnergyUse | None = None
    """What it took of the device's energy; None where nobody keeps account of it."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[Likelihood, ...]:
        return self.choices[0].logprobs


class Piece(str):
    """A piece of an answer's text as it came, and what came with it."""

    choice: int
    """Index of the choice that it belongs to: 0 unless `n` asked for several."""
    logprobs: tuple[Likelihood, ...]

    def __new__(cls, text: str, *, choice: int = 0, logprobs: tuple[Likelihood, ...] = ()) -> Piece:
        """A piece that is its text."""
        piece = super().__new__(cls, text)
        piece.choice, piece.logprobs = choice, logprobs
        return piece


def read_answer(data: object) -> Answer:
    """The body of a whole answer, chat or completion.

    Raises:
        UnavailableError: it is no such body.
    """
    body = _object(data, "the answer")
    choices = sorted(_choices(body), key=lambda one: _count(one, "index"))
    return _answer(body, tuple(map(_whole_choice, choices)))


def _whole_choice(choice: _Json) -> Choice:
    message = choice.get("message")
    text = choice.get("text") if message is None else _object(message, "message").get("content")
    return Choice(
        text=str(text or ""),
        finish_reason=_finish_reason(choice),
        logprobs=_likelihoods(choice),
    )


def read_models(data: object) -> tuple[ModelCard, ...]:
    """The body of `/v1/models`.

    Raises:
        UnavailableError: it is no such body.
    """
    listed = _object(data, "the model list").get("data")
    if not isinstance(listed, list):
        _odd("data")
    cards = [_object(one, "data") for one in listed]
    return tuple(
        ModelCard(
            id=_string(card, "id"),
            created_s=_count(card, "created"),
            context_tokens=_count(card, "context_tokens"),
        )
        for card in cards
    )


@dataclass(slots=True)
class _Said:
    """One choice of a stream so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Likelihood] = field(default_factory=list)
    last: _Json = field(default_factory=dict)


class StreamReader:
    """Bytes of a stream in, texts out; `answer` is there once the stream ended well."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self._decoder = Decoder()
        self._said: dict[int, _Said] = {}
        self._body: dict[str, object] = {}

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """Yield the texts that `chunk` completes.

        Raises:
            TidegateError: the server ended the answer with an error, as that error's class.
            UnavailableError: the bytes are no stream of an OpenAI-compatible server.
        """
        for data in self._decoder.feed(chunk):
            if data == "[DONE]":
                self.answer = self._answer()
                return
            if piece := self._event(_object(_parse(data.encode()), "an event")):
                yield piece

    def finish(self) -> Answer:
        """The whole answer.

        Raises:
            UnavailableError: the stream broke off.
        """
        if self.answer is None:
            raise UnavailableError("the stream broke off before its end")
        return self.answer

    def _event(self, event: _Json) -> Piece:
        if "error" in event:
            raise _error(200, event, {})
        self._body |= {name: value for name, value in event.items() if value is not None}
        if not event.get("choices"):  # the chunk that only brings the usage
            return Piece("")
        choice = _choices(event)[0]
        index = _count(choice, "index")
        said = self._said.setdefault(index, _Said())
        if choice.get("finish_reason"):
            said.last = choice
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else _object(delta, "delta").get("content")
        logprobs = _likelihoods(choice)
        said.texts.append(text if isinstance(text, str) else "")
        said.logprobs += logprobs
        return Piece(said.texts[-1], choice=index, logprobs=logprobs)

    def _answer(self) -> Answer:
        choices = tuple(
            Choice(
                text="".join(said.texts),
                finish_reason=_finish_reason(said.last),
                logprobs=tuple(said.logprobs),
            )
            for _, said in sorted(self._said.items())
        )
        if not choices:
            _odd("choices")
        return _answer(self._body, choices)


def read_body(
    status: int, body: bytes, headers: Mapping[str, str], read: Callable[[object], _T]
) -> _T:
    """What `read` makes of a response's body.

    Raises:
        TidegateError: the response is an error, as that error's class.
    """
    if status != 200:
        raise read_error(status, body, headers)
    return read(_parse(body))


def read_error(status: int, body: bytes, headers: Mapping[str, str]) -> TidegateError:
    """The error that a response stands for; also for one that is no JSON."""
    try:
        data = parse_json(body)
    except ValueError:
        data = None
    return _error(status, data if isinstance(data, dict) else {}, headers)


def _error(status: int, body: _Json, headers: Mapping[str, str]) -> TidegateError:
    told = body.get("error")
    told = told if isinstance(told, dict) else {}
    message = str(told.get("message") or f"the server answered with HTTP status {status}")
    code = told.get("code")
    if status in (401, 403):
        return IdentityError(message)
    if status == 429 or code == CapacityError.code:
        return CapacityError(message, retry_after_s=_retry_after_s(headers))
    if status in (502, 503, 504) or code in (UnavailableError.code, "cancelled"):
        return UnavailableError(message)
    if code == ExecutionError.code:
        return ExecutionError(message)
    if 400 <= status < 500 or code == RequestError.code:
        field = str(told.get("param") or "request")
        problem = message.removeprefix(f"{field}: ")
        return RequestError(field, problem, status=status if status != 200 else 400)
    return TidegateError(message)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    value = headers.get("retry-after", "")
    return float(value) if value.isdecimal() and len(value) < 7 else 1.0


def _answer(body: _Json, choices: tuple[Choice, ...]) -> Answer:
    told = body.get("tidegate")
    told = told if isinstance(told, dict) else {}
    route = told.get("route")
    return Answer(
        choices=choices,
        model=_string(body, "model"),
        usage=_usage(body.get("usage")),
        route=cast(Route, route) if route in get_args(Route) else None,
        reason=_string(told, "reason"),
        request_id=_string(told, "request_id") or _string(body, "id"),
        timings=Timings(
            ttft_s=_amount(told, "ttft_s"),
            total_s=_amount(told, "total_s"),
            tokens_per_s=_amount(told, "tokens_per_s"),
        ),
        dropped_messages=_count(told, "dropped_messages"),
        dropped_tokens=_count(told, "dropped_tokens"),
        energy=_energy(told.get("energy")),
    )


def _energy(data: object) -> EnergyUse | None:
    """None also for what this version does not know: a number without its scope says nothing."""
    use = data if isinstance(data, dict) else {}
    joules, source = _amount(use, "joules"), use.get("source")
    if joules is None or not _string(use, "scope") or source not in get_args(EnergySource):
        return None
    source = cast(EnergySource, source)
    return EnergyUse(joules=joules, scope=_string(use, "scope"), source=source)


def _usage(data: object) -> Usage:
    usage = data if isinstance(data, dict) else {}
    details, guesses = (
        part if isinstance(part := usage.get(f"{name}_tokens_details"), dict) else {}
        for name in ("prompt", "completion")
    )
    return Usage(
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(details, "cached_tokens"),
        accepted_draft_tokens=_count(guesses, "accepted_prediction_tokens"),
        rejected_draft_tokens=_count(guesses, "rejected_prediction_tokens"),
    )


def _parse(body: bytes) -> object:
    try:
        return parse_json(body)
    except ValueError as error:
        raise UnavailableError(f"the server's answer {error}") from None


def _choices(body: _Json) -> list[_Json]:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        _odd("choices")
    return [_object(one, "choices") for one in choices]


def _finish_reason(choice: _Json) -> FinishReason:
    finish_reason = choice.get("finish_reason")
    if finish_reason not in get_args(FinishReason):
        _odd("finish_reason")
    return cast(FinishReason, finish_reason)


def _likelihoods(choice: _Json) -> tuple[Likelihood, ...]:
    try:
        return read_likelihoods(choice.get("logprobs"))
    except ValueError as error:
        _odd(str(error))


def _object(value: object, name: str) -> _Json:
    if not isinstance(value, dict):
        _odd(name)
    return value


def _odd(name: str) -> NoReturn:
    raise UnavailableError(f"no OpenAI-compatible server answered: {name} is not as it must be")


def _string(data: _Json, name: str) -> str:
    value = data.get(name)
    return value if isinstance(value, str) else ""


def _count(data: _Json, name: str) -> int:
    value = data.get(name)
    return value if type(value) is int and value >= 0 else 0


def _amount(data: _Json, name: str) -> float | None:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e9 else None
