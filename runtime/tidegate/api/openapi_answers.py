"""JSON schemas of everything that is answered, for the OpenAPI document.

They are closed: a property that an answer has and its schema has not is a mistake, and tests hold
real answers against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

from tidegate.api.backend import Route
from tidegate.engine.events import EnergySource, FinishReason

Json = dict[str, object]

_TEXT: Final[Json] = {"type": "string"}
_COUNT: Final[Json] = {"type": "integer", "minimum": 0}
_NUMBER: Final[Json] = {"type": "number"}
_SECONDS: Final[Json] = {"type": "number", "minimum": 0}
_FLAG: Final[Json] = {"type": "boolean"}
_TIME: Final[Json] = {"type": "integer", "minimum": 0, "description": "Unix time, seconds."}
_REASON: Final[Json] = {"enum": [*get_args(FinishReason)]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _const(value: str) -> Json:
    return {"const": value}


def _object(
    told: str, required: Mapping[str, Json], optional: Mapping[str, Json] | None = None
) -> Json:
    return {
        "type": "object",
        "description": told,
        "properties": {**required, **(optional or {})},
        "required": [*required],
        "additionalProperties": False,
    }


def _open(told: str, **required: Json) -> Json:
    """An object that may have more than it must."""
    return {
        "type": "object",
        "description": told,
        "properties": required,
        "required": [*required],
    }


_ERROR_DETAIL = _object(
    "OpenAI's error.",
    {"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _TEXT},
)
_ERROR = _object(
    "Everything that goes wrong. Branch on `code` and the status; `message` is for people.",
    {"error": _ref("ErrorDetail")},
)
_USAGE = _object(
    "Tokens of the whole call; the prompt counts once.",
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object("Of the prompt.", {"cached_tokens": _COUNT}),
        "completion_tokens_details": _object(
            "Tokens guessed ahead.",
            {"accepted_prediction_tokens": _COUNT, "rejected_prediction_tokens": _COUNT},
        ),
    },
)
_EXTENSION = _object(
    "Where the call ran and why, and at its end how fast; not part of OpenAI's objects.",
    {
        "route": {"enum": [*get_args(Route)]},
        "reason": _TEXT,
        "model": _TEXT,
        "request_id": _TEXT,
    },
    {
        "dropped_messages": _COUNT,
        "dropped_tokens": _COUNT,
        "ttft_s": _SECONDS,
        "total_s": _SECONDS,
        "tokens_per_s": _or_null(_NUMBER),
        "energy": _ref("Energy"),
    },
)
_ENERGY = _object(
    "What the answer took of the device's energy above idling; absent where nobody keeps account.",
    {
        "joules": {"type": "number", "minimum": 0},
        "scope": _TEXT | {"description": "What they cover, such as a rail or the board."},
        "source": {"enum": [*get_args(EnergySource)]},
    },
)


def _answer(kind: str, choice: str, told: str, *, whole: bool) -> Json:
    """An answer object, or one of its chunks."""
    shared: dict[str, Json] = {
        "id": _TEXT,
        "object": _const(kind),
        "created": _TIME,
        "model": _TEXT,
        "choices": _list(_ref(choice)),
    }
    ends = {"usage": _ref("Usage"), "tidegate": _ref("TidegateAnswer")}
    return _object(told, shared | ends) if whole else _object(told, shared, ends)


_MADE_CALL = _object(
    "A call that the model makes.",
    {
        "id": _TEXT,
        "type": _const("function"),
        "function": _object("What it calls.", {"name": _TEXT, "arguments": _TEXT}),
    },
)
_CALL_PIECE = _object(
    "A piece of a call: its id and name first, then its arguments.",
    {
        "index": _COUNT,
        "function": _object("What is new of it.", {"arguments": _TEXT}, {"name": _TEXT}),
    },
    {"id": _TEXT, "type": _const("function")},
)
_LIKELIHOOD: Final[dict[str, Json]] = {
    "token": _TEXT,
    "logprob": {"type": "number", "maximum": 0},
    "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255}),
}
_SCORED = _object(
    "A token and how likely it was.",
    _LIKELIHOOD | {"top_logprobs": _list(_object("A likelier one, or it.", _LIKELIHOOD))},
)
_CHAT_LOGPROBS = _or_null(
    _object("Of each token.", {"content": _list(_SCORED), "refusal": {"type": "null"}})
)
_COMPLETION_LOGPROBS = _or_null(
    _object(
        "Of each token.",
        {
            "tokens": _list(_TEXT),
            "token_logprobs": _list(_NUMBER),
            "top_logprobs": _list({"type": "object", "additionalProperties": _NUMBER}),
            "text_offset": _list(_COUNT),
        },
    )
)


def _choice(told: str, said: Mapping[str, Json], logprobs: Json, *, whole: bool) -> Json:
    reason = _REASON if whole else _or_null(_REASON)
    return _object(told, {"index": _COUNT, "finish_reason": reason, "logprobs": logprobs, **said})


_MESSAGE = _object(
    "What the model says.",
    {"role": _const("assistant"), "content": _or_null(_TEXT), "refusal": {"type": "null"}},
    {"tool_calls": _list(_ref("MadeToolCall"))},
)
_DELTA = _object(
    "What is new.",
    {},
    {
        "role": _const("assistant"),
        "content": _TEXT,
        "tool_calls": _list(_ref("ToolCallPiece")),
    },
)
_CHAT: Final[dict[str, Json]] = {
    "ChatCompletion": _answer("chat.completion", "ChatChoice", "A whole answer.", whole=True),
    "ChatChoice": _choice("One answer.", {"message": _MESSAGE}, _CHAT_LOGPROBS, whole=True),
    "ChatCompletionChunk": _answer(
        "chat.completion.chunk", "ChatChunkChoice", "An event of a stream.", whole=False
    ),
    "ChatChunkChoice": _choice(
        "What is new of one answer.", {"delta": _DELTA}, _CHAT_LOGPROBS, whole=False
    ),
    "MadeToolCall": _MADE_CALL,
    "ToolCallPiece": _CALL_PIECE,
}
_COMPLETION: Final[dict[str, Json]] = {
    "Completion": _answer("text_completion", "CompletionChoice", "A whole answer.", whole=True),
    "CompletionChoice": _choice("One answer.", {"text": _TEXT}, _COMPLETION_LOGPROBS, whole=True),
    "CompletionChunk": _answer(
        "text_completion", "CompletionChunkChoice", "An event of a stream.", whole=False
    ),
    "CompletionChunkChoice": _choice(
        "What is new of one answer.", {"text": _TEXT}, _COMPLETION_LOGPROBS, whole=False
    ),
}
_OTHERS: Final[dict[str, Json]] = {
    "Model": _object(
        "A model that calls may name.",
        {
            "id": _TEXT,
            "object": _const("model"),
            "created": _TIME,
            "owned_by": _const("tidegate"),
            "context_tokens": _COUNT,
            "max_model_len": _COUNT | {"description": "The same, under vLLM's name."},
        },
        {
            "state": _TEXT | {"description": "Where models come and go: whether it is in memory."},
            "parent": _TEXT | {"description": "Of an adapter: the model that it adapts."},
        },
    ),
    "Models": _object(
        "The models that the caller may name.",
        {"object": _const("list"), "data": _list(_ref("Model"))},
    ),
    "Embeddings": _object(
        "A vector for each input, in their order.",
        {
            "object": _const("list"),
            "data": _list(
                _object(
                    "A vector.",
                    {
                        "object": _const("embedding"),
                        "index": _COUNT,
                        "embedding": {"anyOf": [_list(_NUMBER), _TEXT]},
                    },
                )
            ),
            "model": _TEXT,
            "usage": _object("What was read.", {"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        },
    ),
    "Classification": _object(
        "A label for each input, in their order; shapes as vLLM has them.",
        {
            "id": _TEXT,
            "object": _const("list"),
            "created": _TIME,
            "model": _TEXT,
            "data": _list(
                _object(
                    "How likely each label is.",
                    {
                        "index": _COUNT,
                        "label": _TEXT,
                        "probs": _list(_NUMBER),
                        "num_classes": _COUNT,
                    },
                )
            ),
            "usage": _object(
                "What was read.",
                {"prompt_tokens": _COUNT, "total_tokens": _COUNT, "completion_tokens": _COUNT},
            ),
        },
    ),
    "Tokenized": _object(
        "The tokens of a text.",
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": _list(_COUNT),
            "token_strs": _or_null(_list(_TEXT)),
        },
    ),
    "Explained": _object(
        "Where a call would run, and by which numbers. For people: more may be told.",
        {
            "route": _TEXT,
            "reason": _TEXT,
            "filters": {"description": "What closes a place, whatever it costs."},
            "clock": _open(
                "Seconds to the whole answer; null: not known.",
                edge_s=_or_null(_SECONDS),
                cloud_s=_or_null(_SECONDS),
            ),
            "pace": _or_null(
                _open(
                    "What the scheduler by energy says; null where there is none.",
                    mode=_TEXT,
                    reason=_TEXT,
                    terms=_or_null(
                        _open(
                            "What either way counts, in joules; null: it is closed. And how late.",
                            local_j=_or_null(_NUMBER),
                            cloud_j=_or_null(_NUMBER),
                            late_local_s=_or_null(_SECONDS),
                            late_cloud_s=_or_null(_SECONDS),
                        )
                    ),
                )
            ),
            "state": {
                "type": "object",
                "description": "What it was decided by: weights, battery, heat, load.",
            },
        },
    ),
    "Detokenized": _object("The text of tokens.", {"prompt": _TEXT}),
    "Health": _object("Whether work makes progress.", {"healthy": _FLAG, "detail": _TEXT}),
    "Ready": _object("Whether calls are taken.", {"ready": _FLAG, "detail": _TEXT}),
    "Status": {
        "type": "object",
        "description": "Queues, memory, routes, link: for people, and it may change.",
    },
}
_CHANGES: Final[dict[str, Json]] = {
    "changes": _list(
        _object(
            "What became of one model.",
            {
                "name": _TEXT,
                "kind": {"enum": ["added", "removed", "replaced", "settings", "same"]},
                "problem": _or_null(_TEXT),
            },
        )
    ),
    "after_restart": _list(_TEXT),
}
_RELOAD: Final[dict[str, Json]] = {
    "Reloaded": _object("What a reload did.", _CHANGES),
    "ReloadProblem": _object(
        "Why it was not done; with changes, if a part of it was.",
        {"error": _ref("ErrorDetail")},
        _CHANGES,
    ),
}
_HELD: Final[dict[str, Json]] = {
    "id": _TEXT,
    "state": {"enum": ["running", "whole", "failed"]},
    "code": _or_null(_TEXT),
    "age_s": _SECONDS,
    "held_bytes": _COUNT,
    "is_read": _FLAG,
}
_LINK: Final[dict[str, Json]] = {
    "LinkAnswers": _object(
        "What the outbox holds.", {"answers": _list(_object("No text.", _HELD))}
    ),
    "LinkAnswer": _object(
        "An answer; its text once it is whole.",
        _HELD,
        {
            "text": _TEXT,
            "problem": _TEXT,
            "finish_reason": _or_null(_REASON),
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
        },
    ),
}

ANSWERS: Final[dict[str, Json]] = {
    "Error": _ERROR,
    "ErrorDetail": _ERROR_DETAIL,
    "Usage": _USAGE,
    "TidegateAnswer": _EXTENSION,
    "Energy": _ENERGY,
    **_CHAT,
    **_COMPLETION,
    **_OTHERS,
    **_RELOAD,
    **_LINK,
}
"""Schemas by the name that the document has them under."""
