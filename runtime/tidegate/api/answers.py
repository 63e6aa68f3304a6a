"""OpenAI's response objects, built from answer events.

Every answer carries the `tidegate` object: where the call ran and why, and at the end how fast and
what it took of the device's energy.
In a stream the first chunk has it without timings and the last with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tidegate.api.answer_logprobs import logprobs_object
from tidegate.api.backend import ModelCard, Routed
from tidegate.api.schema_sampling import Kind
from tidegate.api.tools import ToolCall, ToolDelta, tool_call_object
from tidegate.engine.events import EnergyUse, Finished, ScoredToken, Usage
from tidegate.errors import (
    AccessError,
    DeadlineError,
    DeviceRefusedError,
    RequestError,
    TidegateError,
)

Json = dict[str, object]

_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_STATUS_OF_CODE = {
    "invalid_request": 400,
    "device_refused": 403,
    "access_denied": 403,
    "over_capacity": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "unavailable": 503,
    "cancelled": 503,
    "deadline_exceeded": 504,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """What all objects of one choice share. `created_s` is Unix time."""

    kind: Kind
    created_s: int
    request_id: str
    """Of the whole answer: all its choices have the same."""
    routed: Routed
    index: int = 0

    def object(self, *, chunk: bool) -> Json:
        """The fields that every object of the answer starts with."""
        chat = self.kind == "chat"
        return {
            "id": ("chatcmpl-" if chat else "cmpl-") + self.request_id,
            "object": ("chat.completion" + ".chunk" * chunk) if chat else "text_completion",
            "created": self.created_s,
            "model": self.routed.model,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One choice of an answer that was not streamed."""

    index: int
    text: str = field(repr=False)
    scored: tuple[ScoredToken, ...] | None = field(repr=False)
    """None when likelihoods were not asked for."""
    finished: Finished
    calls: tuple[ToolCall, ...] = ()


_DROPPED = ("dropped_messages", "dropped_tokens")


def extension(routed: Routed, finished: Finished | None = None) -> Json:
    """The `tidegate` object. Times in seconds; tokens_per_s is null for a single token.

    `energy` is absent where nobody keeps account of it.
    """
    told: Json = {
        "route": routed.route,
        "reason": routed.reason,
        "model": routed.model,
        "request_id": routed.request_id,
    }
    told |= {name: count for name in _DROPPED if (count := getattr(routed, name))}
    if finished is not None:
        told["ttft_s"] = round(finished.timing.first_token_s, 6)
        told["total_s"] = round(finished.timing.total_s, 6)
        told["tokens_per_s"] = decode_rate(finished)
        if finished.energy is not None:
            told["energy"] = energy_object(finished.energy)
    return told


def energy_object(use: EnergyUse) -> Json:
    """Joules with four digits: no sensor of such a board knows more."""
    return {"joules": float(f"{use.joules:.4g}"), "scope": use.scope, "source": use.source}


def decode_rate(finished: Finished) -> float | None:
    """Tokens per second after the first; None when there was no second token to time."""
    later = finished.usage.completion_tokens - 1
    decode_s = finished.timing.decode_s
    return round(later / decode_s, 3) if later > 0 and decode_s > 0 else None


def usage_object(usage: Usage) -> Json:
    """OpenAI's `usage`; rejected guesses are no part of the completion's tokens here."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_draft_tokens,
            "rejected_prediction_tokens": usage.rejected_draft_tokens,
        },
    }


def whole(heading: Heading, said: Sequence[Said], finished: Finished) -> Json:
    """The one object of an answer that was not streamed; `finished` is the end of all choices."""
    return heading.object(chunk=False) | {
        "choices": [_choice(heading.kind, one) for one in said],
        "usage": usage_object(finished.usage),
        "tidegate": extension(heading.routed, finished),
    }


def _choice(kind: Kind, said: Said) -> Json:
    choice: Json = {
        "index": said.index,
        "finish_reason": said.finished.reason,
        "logprobs": None if said.scored is None else logprobs_object(kind, said.scored),
    }
    if kind == "chat":
        choice["message"] = _message(said)
    else:
        choice["text"] = said.text
    return choice


def _message(said: Said) -> Json:
    message: Json = {"role": "assistant", "content": said.text, "refusal": None}
    if said.calls:
        message["content"] = said.text or None
        message["tool_calls"] = [tool_call_object(call) for call in said.calls]
    return message


def opening(heading: Heading) -> Json:
    """The first chunk: the role, no text yet, and where the call runs."""
    return _chunk(heading, "", role=True) | {"tidegate": extension(heading.routed)}


def delta(heading: Heading, text: str, scored: Sequence[ScoredToken] = ()) -> Json:
    """A chunk of text, and how likely its tokens were."""
    return _chunk(heading, text, scored=scored)


def tool_delta(heading: Heading, piece: ToolDelta) -> Json:
    """A chunk of a call: its id and name with no arguments yet, or a piece of its arguments."""
    function: Json = {"arguments": piece.arguments}
    call: Json = {"index": piece.index, "function": function}
    if piece.id is not None:
        call |= {"id": piece.id, "type": "function"}
        function["name"] = piece.name
    choice: Json = {
        "index": heading.index,
        "delta": {"tool_calls": [call]},
        "finish_reason": None,
        "logprobs": None,
    }
    return heading.object(chunk=True) | {"choices": [choice]}


def closing(heading: Heading, finished: Finished) -> Json:
    """The chunk that says why the answer ended."""
    last = _chunk(heading, None, reason=finished.reason)
    return last | {"tidegate": extension(heading.routed, finished)}


def usage_chunk(heading: Heading, finished: Finished) -> Json:
    """After the last `closing`, for `stream_options.include_usage`: no choice, all the usage."""
    return heading.object(chunk=True) | {
        "choices": [],
        "usage": usage_object(finished.usage),
        "tidegate": extension(heading.routed, finished),
    }


def _chunk(
    heading: Heading,
    text: str | None,
    *,
    role: bool = False,
    reason: str | None = None,
    scored: Sequence[ScoredToken] = (),
) -> Json:
    logprobs = logprobs_object(heading.kind, scored) if scored else None
    choice: Json = {"index": heading.index, "finish_reason": reason, "logprobs": logprobs}
    if heading.kind == "chat":
        said = {} if text is None else {"content": text}
        choice["delta"] = {"role": "assistant", **said} if role else said
    else:
        choice["text"] = text or ""
    return heading.object(chunk=True) | {"choices": [choice]}


def models_object(cards: tuple[ModelCard, ...]) -> Json:
    """The body of `/v1/models`; `context_tokens` is ours, `max_model_len` is vLLM's name for it."""
    return {
        "object": "list",
        "data": [
            {
                "id": card.id,
                "object": "model",
                "created": card.created_s,
                "owned_by": "tidegate",
                "context_tokens": card.context_tokens,
                "max_model_len": card.context_tokens,
                **({} if card.state is None else {"state": card.state}),
                **({} if card.parent is None else {"parent": card.parent}),
            }
            for card in cards
        ],
    }


def error_object(message: str, *, status: int, code: str, param: str | None = None) -> Json:
    """OpenAI's error object. `code` is stable, `param` the field that was wrong."""
    kind = _TYPE_OF_STATUS.get(status)
    if kind is None:
        kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of_code(code: str) -> int:
    """The HTTP status of a `Failed.code`; 500 for one that names no fault of the request."""
    return _STATUS_OF_CODE.get(code, 500)


HIDDEN_MESSAGE: Final = "the request failed; see the server's log"


def error_answer(error: TidegateError) -> tuple[int, Json]:
    """The HTTP status and body for an error raised on purpose."""
    if isinstance(error, RequestError):
        code = "model_not_found" if (error.field, error.status) == ("model", 404) else error.code
        body = error_object(str(error), status=error.status, code=code, param=error.field)
        return error.status, body
    status = status_of_code(error.code)
    # A ConfigError or BundleError that surfaces in a request names files of the host.
    told = error.retryable or isinstance(error, AccessError | DeadlineError | DeviceRefusedError)
    message = str(error) if told else HIDDEN_MESSAGE
    return status, error_object(message, status=status, code=error.code)
