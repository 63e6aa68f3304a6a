"""A `Constraint` in the matcher's own words, within bounds of size and nesting. Pure.

JSON comes on one line, with at most one blank after a comma or a colon: a model that may put any
white space between tokens can do so until its tokens run out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llguidance import LLMatcher

from tidegate.engine.grammar_schema import check_schema, walk
from tidegate.engine.request import Constraint
from tidegate.errors import ConfigError, RequestError

_SPELLING: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""How the matcher lets JSON be written; the separators are regular expressions."""

_CHOICES: Final = 1024
_PLACES: Final = 256
"""Parts of a refused schema that are tried alone, to find the one to blame."""
_REASON_CHARS: Final = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarLimits:
    """What one engine's grammars may cost; the library bounds the work of one mask by itself."""

    source_bytes: int = 1 << 16
    nesting: int = 64
    """Schemas within schemas."""
    compile_s: float = 5.0
    """Longest wait for one grammar; one of 512 properties takes 0.1 s on a Zen 4 core."""
    kept: int = 64
    """Compiled grammars; each is some 10 kB to a few MB."""
    waiting: int = 16
    """Grammars that may wait to be compiled."""

    def __post_init__(self) -> None:
        for name in ("source_bytes", "nesting", "kept", "waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if not self.compile_s > 0:
            raise ConfigError("compile_s", self.compile_s, "more than 0")


def grammar_source(constraint: Constraint, limits: GrammarLimits) -> str:
    """The grammar as the matcher reads it; whether it can be built shows when it is.

    Raises:
        RequestError: it is too long, too deep, no JSON, or asks for what cannot be enforced.
    """
    size = len(constraint.source.encode())
    if size > limits.source_bytes:
        problem = f"{size} bytes: must be at most {limits.source_bytes}"
        raise RequestError(constraint.name, problem, status=413)
    match constraint.kind:
        case "json_schema":
            schema = _parsed(constraint)
            check_schema(schema, name=constraint.name, most_nested=limits.nesting)
            return schema_source(schema)
        case "json_object":
            return schema_source({"type": "object"})
        case "choice":
            return LLMatcher.grammar_from_lark(_choice(constraint))
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.source)
        case "grammar":
            return LLMatcher.grammar_from_lark(constraint.source)


def schema_source(schema: object) -> str:
    """The grammar of a schema."""
    return LLMatcher.grammar_from_json_schema(schema_text(schema))


def schema_text(schema: object) -> str:
    """A schema for the matcher, alone or after `%json`, with how its JSON is to be spelled."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    assert isinstance(schema, dict), "check_schema came first"
    return json.dumps({**schema, "x-guidance": _SPELLING})


def reason_of(error: str) -> str:
    """The line of the matcher's message that says what is wrong; the others show the grammar."""
    lines = error.splitlines() or [""]
    named = next((line for line in lines if line.startswith("error: ")), lines[0])
    return named.removeprefix("error: ")[:_REASON_CHARS]


def place_of(constraint: Constraint, reason: str, try_alone: Callable[[str], str]) -> str:
    """The path of the smallest part of a schema that is refused alone, for the same reason.

    Args:
        constraint: what was refused.
        reason: why.
        try_alone: a grammar to the matcher's message about it, empty for a good one.
    """
    place = constraint.name
    if constraint.kind != "json_schema":
        return place
    schema = _parsed(constraint)
    shared = _definitions(schema) if isinstance(schema, dict) else {}
    parts = walk(schema, constraint.name, most_nested=2**31)
    for _, (path, part) in zip(range(_PLACES), parts, strict=False):
        if isinstance(part, dict) and len(path) > len(place):
            alone = try_alone(schema_source({**shared, **part}))
            if alone and reason_of(alone) == reason and path.startswith(place):
                place = path
    return place


def _definitions(schema: dict[str, object]) -> dict[str, object]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def _parsed(constraint: Constraint) -> object:
    try:
        parsed: object = json.loads(constraint.source)
    except (ValueError, RecursionError) as error:
        raise RequestError(constraint.name, f"is not JSON: {type(error).__name__}") from None
    return parsed


def _choice(constraint: Constraint) -> str:
    texts = _parsed(constraint)
    if (
        not isinstance(texts, list)
        or not 0 < len(texts) <= _CHOICES
        or not all(isinstance(text, str) and text for text in texts)
    ):
        problem = f"must be a list of 1 to {_CHOICES} strings, none of them empty"
        raise RequestError(constraint.name, problem)
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
