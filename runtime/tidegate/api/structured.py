"""What an answer must look like, as requests spell it: OpenAI's `response_format` or vLLM's fields.

`structured_outputs` is the spelling that travels on; vLLM's older `guided_*` fields are read too.
A request may ask for one shape only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from tidegate.api.field_table import Choice, Field, Flag, Ignored, Inner, Name, Raw, Table
from tidegate.api.fields import Fields, kind_of, one_of, prose, shown
from tidegate.engine.request import Constraint, ConstraintKind
from tidegate.errors import RequestError

_NAME_CHARS: Final = 64
_OLD_NAMES: Final = ("json", "regex", "choice", "grammar")
_FORMATS: Final = ("text", "json_object", "json_schema")

_SCHEMA: Final = {"type": ["object", "boolean", "string"]}
_TEXT: Final = {"type": "string"}
_TEXTS: Final = {"type": "array", "items": _TEXT}
_FORMAT_TYPE = Choice(
    name="type", allowed=_FORMATS, required=True, told="text asks for nothing; the others for JSON."
)
_FORMAT_NAME = Name(
    name="name", most_chars=_NAME_CHARS, required=True, told="Of the schema; not told to the model."
)
_FORMAT_STRICT = Flag(name="strict", told="The schema is enforced either way.")
_FORMAT_SCHEMA = Raw(
    name="schema",
    schema_=_SCHEMA,
    required=True,
    told="The JSON schema, or its text. docs/structured-output.md lists what can be enforced.",
)
_FORMAT_JSON = Inner(
    name="json_schema",
    told="Must come with type json_schema.",
    table=Table(
        name="JsonSchemaFormat",
        told="A JSON schema that the answer will keep to.",
        fields=(
            _FORMAT_NAME,
            Ignored(name="description", kind="string", told="Not told to the model."),
            _FORMAT_STRICT,
            _FORMAT_SCHEMA,
        ),
    ),
)
_FORMAT = Inner(
    name="response_format",
    told="What the answer must look like, in OpenAI's words.",
    table=Table(
        name="ResponseFormat",
        told="What the answer must look like.",
        fields=(_FORMAT_TYPE, _FORMAT_JSON),
    ),
)
_BEGUN = Raw(
    name="begun", schema_=_TEXT, told="The beginning of the answer, which came before this call."
)
_KINDS: Final[tuple[Field, ...]] = (
    Raw(name="json", schema_=_SCHEMA, told="A JSON schema, or its text."),
    Raw(name="regex", schema_=_TEXT, told="A regular expression that matches the whole answer."),
    Raw(name="choice", schema_=_TEXTS, told="One of these texts."),
    Raw(name="grammar", schema_=_TEXT, told="A Lark grammar."),
    Raw(name="json_object", schema_={"enum": [True]}, told="Any JSON object."),
)
_OUTPUTS = Inner(
    name="structured_outputs",
    told="What the answer must look like, in vLLM's words.",
    table=Table(
        name="StructuredOutputs",
        told="One of the shapes, and maybe what is there of the answer already.",
        fields=(*_KINDS, _BEGUN),
    ),
)
CONSTRAINT_FIELDS: Final[tuple[Field, ...]] = (
    _FORMAT,
    _OUTPUTS,
    *(replace(one, name=f"guided_{one.name}") for one in _KINDS if one.name in _OLD_NAMES),
)
"""At most one of them may ask for a shape."""


def read_constraint(fields: Fields) -> Constraint | None:
    """What a request's answer must look like; None when it is free.

    Raises:
        RequestError: a field is wrong, or two ask for a shape.
    """
    found = [*_wishes(fields)]
    if len(found) > 1:
        problem = f"asks for a shape, and {found[0].name} does too: must be one of them"
        raise RequestError(found[1].name, problem)
    return found[0] if found else None


def _wishes(fields: Fields) -> Iterator[Constraint]:
    form = _FORMAT.read(fields)
    wanted = None if form is None else _response_format(form)
    if wanted is not None:
        yield wanted
    outputs = _OUTPUTS.read(fields)
    if outputs is not None:
        yield _structured_outputs(outputs)
    for name in _OLD_NAMES:
        if fields.raw(f"guided_{name}") is not None:
            yield _READERS[name](fields, f"guided_{name}")


def _response_format(fields: Fields) -> Constraint | None:
    kind = _FORMAT_TYPE.read(fields)
    if kind is None:
        raise RequestError(fields.path("type"), f"is absent: must be {one_of(_FORMATS)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(kind="json_object", name="response_format")
    described = _FORMAT_JSON.read(fields)
    if described is None:
        raise RequestError(fields.path("json_schema"), "is absent")
    if _FORMAT_NAME.read(described) is None:
        raise RequestError(described.path("name"), "is absent")
    # Enforced either way: a promise that is sometimes kept helps nobody.
    _FORMAT_STRICT.read(described)
    if _FORMAT_SCHEMA.read(described) is None:
        raise RequestError(described.path("schema"), "is absent")
    return _json(described, "schema")


def _structured_outputs(fields: Fields) -> Constraint:
    given = [name for name in _READERS if fields.raw(name) is not None]
    if len(given) != 1:
        found = f"has {len(given)}" if given else "has none"
        raise RequestError("structured_outputs", f"{found}: must have one of {one_of([*_READERS])}")
    read = _READERS[given[0]](fields, given[0])
    begun = _BEGUN.read(fields)
    text = "" if begun is None else prose(begun, fields.path("begun"))
    return Constraint(kind=read.kind, source=read.source, begun=text, name=read.name)


def _json(fields: Fields, name: str) -> Constraint:
    """A schema as an object, or as the JSON text of one."""
    value, path = fields.raw(name), fields.path(name)
    if isinstance(value, str):
        return Constraint(kind="json_schema", source=prose(value, path), name=path)
    if not isinstance(value, dict | bool):
        raise RequestError(path, f"is {kind_of(value)}: must be a JSON schema")
    return Constraint(kind="json_schema", source=_dumped(value, path), name=path)


def _json_object(fields: Fields, name: str) -> Constraint:
    if fields.flag(name) is not True:
        raise RequestError(fields.path(name), f"{shown(fields.raw(name))}: must be true or absent")
    return Constraint(kind="json_object", name=fields.path(name))


def _choice(fields: Fields, name: str) -> Constraint:
    value, path = fields.raw(name), fields.path(name)
    if not isinstance(value, list):
        raise RequestError(path, f"is {kind_of(value)}: must be a list of strings")
    texts = [prose(text, f"{path}[{index}]") for index, text in enumerate(value)]
    return Constraint(kind="choice", source=_dumped(texts, path), name=path)


def _text(kind: ConstraintKind) -> Callable[[Fields, str], Constraint]:
    def read(fields: Fields, name: str) -> Constraint:
        path = fields.path(name)
        return Constraint(kind=kind, source=prose(fields.raw(name), path), name=path)

    return read


_READERS: Final[dict[str, Callable[[Fields, str], Constraint]]] = {
    "json": _json,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("grammar"),
    "json_object": _json_object,
}


def _dumped(value: object, path: str) -> str:
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        raise RequestError(path, "is nested too deeply or holds too long a number") from None


def constraint_json(constraint: Constraint) -> dict[str, object]:
    """The `structured_outputs` that `read_constraint` reads back as an equal constraint."""
    begun: dict[str, object] = {"begun": constraint.begun} if constraint.begun else {}
    match constraint.kind:
        case "json_schema":
            return {"json": constraint.source, **begun}
        case "json_object":
            return {"json_object": True, **begun}
        case "choice":
            return {"choice": json.loads(constraint.source), **begun}
        case "regex" | "grammar":
            return {constraint.kind: constraint.source, **begun}
