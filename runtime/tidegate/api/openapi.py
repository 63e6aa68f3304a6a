"""The OpenAPI 3.1 document, made from the tables that requests are read by.

What an answer looks like is in `openapi_answers`, which calls there are in `openapi_operations`.
The document is the same for every service; `docs/openapi.json` is a copy of it, written by
`scripts/write-openapi`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tidegate.api.field_table import Table
from tidegate.api.openapi_answers import ANSWERS
from tidegate.api.openapi_operations import OPERATIONS, Operation

Json = dict[str, object]

PATH: Final = "/openapi.json"
_VERSION: Final = "1"
_INTRODUCTION: Final = (
    "OpenAI's API, and some of vLLM's, of Tidegate devices and of the cloud that takes their "
    "overflow. A field that is not here is refused with its name. Keys are bearer tokens; a device "
    "that is reached on loopback only asks for none. docs/api.md says more."
)

_PROBLEMS: Final[dict[int, str]] = {
    400: "A field is wrong, or the body is no JSON. `param` names the field.",
    401: "No valid API key was given, or it has expired or was revoked.",
    403: "The key may not do this, the Host is not served here, or the device is refused.",
    404: "There is no such model, path or answer.",
    408: "The body did not come in time.",
    409: "The same Idempotency-Key is being answered, or the answer is being read.",
    413: "The body, the prompt or what is asked for is too long.",
    415: "The body is not declared as application/json.",
    422: "The call cannot run anywhere, or its Idempotency-Key came with another call.",
    429: "A limit of the key is used up, or the service is full. Wait as Retry-After says.",
    431: "The head of the request is too long.",
    500: "The service failed; its log says why.",
    503: "Not now: the service starts, drains or lost its link. Wait as Retry-After says.",
    504: "The answer was not there by its deadline.",
}
_RETRY_AFTER: Final = {
    "description": "Seconds to wait before asking again.",
    "schema": {"type": "string", "pattern": "^[0-9]+$"},
}
_REQUEST_ID: Final = {
    "description": "The id of the request, also in the service's log.",
    "schema": {"type": "string"},
}
_LIMIT_NAMES: Final = tuple(
    f"x-ratelimit-{what}-{unit}"
    for what in ("limit", "remaining", "reset")
    for unit in ("requests", "tokens")
)


def document() -> Json:
    """The whole document, as JSON."""
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tidegate", "version": _VERSION, "description": _INTRODUCTION},
        "servers": [{"url": "/"}],
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(_schemas().items())),
            "responses": {_problem_name(status): _problem(status) for status in _PROBLEMS},
            "headers": {
                "RetryAfter": _RETRY_AFTER,
                "RequestId": _REQUEST_ID,
                **{_limit_name(name): _limit(name) for name in _LIMIT_NAMES},
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def document_text() -> str:
    """The document as `docs/openapi.json` holds it."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def document_route() -> Route:
    """Serves it; made once."""
    body = json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()

    async def show(_: Request) -> Response:
        return Response(body, media_type="application/json")

    return Route(PATH, show)


def _schemas() -> dict[str, Json]:
    tables = _walk([one.body for one in OPERATIONS if one.body is not None], {})
    shared = tables.keys() & ANSWERS.keys()
    assert not shared, f"two schemas have the same name: {shared}"
    whole: Json = {"type": "object", "description": "An OpenAPI document."}
    return {name: table.schema() for name, table in tables.items()} | ANSWERS | {"OpenAPI": whole}


def _walk(tables: Iterable[Table], found: dict[str, Table]) -> dict[str, Table]:
    """All tables that these hold, by their names."""
    for table in tables:
        known = found.setdefault(table.name, table)
        assert known == table, f"two tables are called {table.name}"
        for field in table.fields:
            _walk(field.tables, found)
    return found


def _operation(operation: Operation) -> Json:
    answer: Json = {"description": "It went well.", "headers": _headers(operation)}
    content = _content(operation)
    if content:
        answer["content"] = content
    told: Json = {
        "operationId": operation.name,
        "summary": operation.told,
        "parameters": _parameters(operation),
        "responses": {
            str(operation.status): answer,
            **{
                str(status): {"$ref": f"#/components/responses/{_problem_name(status)}"}
                for status in sorted(operation.errors)
            },
            **_unfit(operation),
        },
    }
    if operation.body is not None:
        told["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _body(operation.body, operation.or_body)}},
        }
    if not operation.needs_key:
        told["security"] = [{}]
    return told


def _body(body: Table, other: Table | None) -> Json:
    return body.reference if other is None else {"anyOf": [body.reference, other.reference]}


def _content(operation: Operation) -> Json:
    """What a good answer holds, by its kind."""
    if operation.status == 204:
        return {}
    if operation.answer is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content: Json = {"application/json": {"schema": _reference(operation.answer)}}
    if operation.event is not None:
        said = (
            f"Events whose data is a {operation.event}, or an Error, which is then the last; "
            "otherwise [DONE] is the last. Lines that begin with a colon keep the stream alive."
        )
        # OpenAPI 3.1 has no words for the data of an event.
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": said},
            "x-event-schema": _reference(operation.event),
        }
    return content


def _unfit(operation: Operation) -> Json:
    """The status that has an object of its own instead of the error."""
    if operation.problem is None:
        return {}
    status, schema = operation.problem
    headers: Json = {"X-Request-Id": _header("RequestId")}
    if status == 503:
        headers["Retry-After"] = _header("RetryAfter")
    content = {"application/json": {"schema": _reference(schema)}}
    told = "Not now." if status == 503 else "It was not done, or not all of it."
    return {str(status): {"description": told, "headers": headers, "content": content}}


def _parameters(operation: Operation) -> list[Json]:
    found: list[Json] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
        }
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]
    if operation.event is not None:
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "The same call with the same key is not computed twice.",
                "schema": {
                    "type": "string",
                    "maxLength": 255,
                    "pattern": "^[!-~]([ -~]*[!-~])?$",
                },
            }
        )
    return found


def _headers(operation: Operation) -> Json:
    headers: Json = {"X-Request-Id": _header("RequestId")}
    if operation.body is not None:
        headers |= {name: _header(_limit_name(name)) for name in _LIMIT_NAMES}
    return headers


def _problem(status: int) -> Json:
    headers: Json = {"X-Request-Id": _header("RequestId")}
    if status in (429, 503):
        headers["Retry-After"] = _header("RetryAfter")
    if status == 429:
        headers |= {name: _header(_limit_name(name)) for name in _LIMIT_NAMES}
    if status == 401:
        headers["WWW-Authenticate"] = {
            "description": "Bearer.",
            "schema": {"type": "string"},
        }
    return {
        "description": _PROBLEMS[status],
        "headers": headers,
        "content": {"application/json": {"schema": _reference("Error")}},
    }


def _problem_name(status: int) -> str:
    return f"Problem{status}"


def _limit_name(name: str) -> str:
    """`x-ratelimit-limit-requests` as a component: `RatelimitLimitRequests`."""
    return "".join(part.capitalize() for part in name.split("-")[1:])


def _limit(name: str) -> Json:
    return {
        "description": f"{name.split('-', 2)[2]}, where the key has such a rate.",
        "schema": {"type": "string"},
    }


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _header(name: str) -> Json:
    return {"$ref": f"#/components/headers/{name}"}
