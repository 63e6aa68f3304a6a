"""Every call of the HTTP surface, on a device and in the cloud, for the OpenAPI document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from tidegate.api.classify import CLASSIFICATION
from tidegate.api.embeddings import EMBEDDING
from tidegate.api.field_table import Table
from tidegate.api.operating import RELOAD
from tidegate.api.schema import CHAT, COMPLETION
from tidegate.api.tokens import DETOKENIZE, TOKENIZE

Method = Literal["get", "post", "delete"]

_READING: Final = (401, 403, 404, 408, 413, 415, 429, 431, 500, 503, 504)
_ANSWERING: Final = (400, *_READING, 409, 422)
_SHOWING: Final = (401, 403, 404, 429, 431, 500, 503)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One method of one path."""

    method: Method
    path: str
    name: str
    told: str
    body: Table | None = None
    or_body: Table | None = None
    """What may come instead of `body`."""
    answer: str | None = None
    """The schema of a good answer; None: it is no JSON."""
    event: str | None = None
    """The schema of the events of a stream, for calls that have one."""
    status: int = 200
    errors: tuple[int, ...] = _SHOWING
    problem: tuple[int, str] | None = None
    """A status that has an object of its own instead of the error, and its schema."""
    needs_key: bool = True
    """Where keys are asked for at all."""


def _call(path: str, name: str, told: str, body: Table, answer: str, event: str) -> Operation:
    return Operation(
        method="post",
        path=path,
        name=name,
        told=told,
        body=body,
        answer=answer,
        event=event,
        errors=_ANSWERING,
    )


def _reading(path: str, name: str, told: str, body: Table, answer: str) -> Operation:
    return Operation(
        method="post",
        path=path,
        name=name,
        told=told,
        body=body,
        answer=answer,
        errors=(400, *_READING),
    )


def _shown(path: str, name: str, told: str, answer: str) -> Operation:
    return Operation(method="get", path=path, name=name, told=told, answer=answer)


def _probe(path: str, name: str, told: str, answer: str | None) -> Operation:
    return Operation(
        method="get",
        path=path,
        name=name,
        told=told,
        answer=answer,
        errors=(401, 403, 429, 431, 500, 503) if answer is None else (403, 431, 500),
        problem=(503, answer) if answer in ("Health", "Ready") else None,
        needs_key=False,
    )


_OF_A_LINK: Final = "Only on a device with a link."

OPERATIONS: Final = (
    _call(
        "/v1/chat/completions",
        "chat",
        "Answers a chat, whole or as a stream.",
        CHAT,
        "ChatCompletion",
        "ChatCompletionChunk",
    ),
    _call(
        "/v1/completions",
        "complete",
        "Goes on with a raw prompt, whole or as a stream.",
        COMPLETION,
        "Completion",
        "CompletionChunk",
    ),
    Operation(
        method="post",
        path="/route/explain",
        name="explainRoute",
        told="Where a call would run now and why; it is not run. Only on a device.",
        body=CHAT,
        or_body=COMPLETION,
        answer="Explained",
        errors=(400, *_READING, 422),
    ),
    _reading("/v1/embeddings", "embed", "Texts as vectors.", EMBEDDING, "Embeddings"),
    *(
        operation
        for root, suffix in (("", ""), ("/v1", "V1"))
        for operation in (
            _reading(
                f"{root}/classify",
                f"classify{suffix}",
                "A label for each text.",
                CLASSIFICATION,
                "Classification",
            ),
            _reading(
                f"{root}/tokenize",
                f"tokenize{suffix}",
                "The tokens of a text or a chat.",
                TOKENIZE,
                "Tokenized",
            ),
            _reading(
                f"{root}/detokenize",
                f"detokenize{suffix}",
                "The text of tokens.",
                DETOKENIZE,
                "Detokenized",
            ),
        )
    ),
    _shown("/v1/models", "listModels", "The models that the caller may name.", "Models"),
    Operation(
        method="post",
        path="/admin/reload",
        name="reload",
        told="The cloud reads its settings again and changes its models.",
        body=RELOAD,
        answer="Reloaded",
        errors=(400, *_READING),
        problem=(409, "ReloadProblem"),
    ),
    _shown("/v1/models/{model}", "showModel", "One of them.", "Model"),
    _probe("/health", "health", "Whether work makes progress; 503 if not.", "Health"),
    _probe("/ready", "ready", "Whether calls are taken; 503 if not.", "Ready"),
    _probe("/metrics", "metrics", "For Prometheus. A service may want a key.", None),
    _probe("/openapi.json", "openapi", "This document.", "OpenAPI"),
    _shown("/status", "status", "Load, memory, routes, link; not on every service.", "Status"),
    _shown(
        "/link/answers", "listAnswers", f"Answers that the link holds. {_OF_A_LINK}", "LinkAnswers"
    ),
    _shown("/link/answers/{id}", "showAnswer", f"One of them. {_OF_A_LINK}", "LinkAnswer"),
    Operation(
        method="delete",
        path="/link/answers/{id}",
        name="forgetAnswer",
        told=f"Forgets it, or stops it while it runs. {_OF_A_LINK}",
        status=204,
        errors=(*_SHOWING, 409),
    ),
)
"""All of them. A service has those that it serves."""
