"""Tables of a request's fields: what the parser reads by is what the OpenAPI document is made from.

An object that was opened with its table gives only fields that the table has, and refuses any that
it has not. So nothing can be accepted and undocumented. `null` counts as absent throughout.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import Final

from tidegate.api.fields import Fields, kind_of, one_of, shown
from tidegate.errors import RequestError

Json = dict[str, object]

_FEW: Final = 12
"""A table of at most so many fields is listed whole to who asked for another."""
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_.-]{1,40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Field(ABC):
    """One field; `told` is its line in the document."""

    name: str
    told: str
    required: bool = False

    @abstractmethod
    def shape(self) -> Json:
        """The JSON schema of its value, when it is there."""

    @property
    def tables(self) -> tuple[Table, ...]:
        """Of the objects in it."""
        return ()

    def check(self, fields: Fields) -> None:
        """Refuse a wrong value of a field that no reader asks for."""
        return

    def schema(self) -> Json:
        """Its JSON schema: `shape`, or null where it may be absent."""
        shape = self.shape()
        if not self.required:
            shape = _or_null(shape)
        return shape | {"description": self.told}


def _or_null(shape: Json) -> Json:
    if "enum" in shape:
        assert isinstance(shape["enum"], list)
        return shape | {"enum": [*shape["enum"], None]}
    kinds = shape.get("type")
    if kinds is not None:
        return shape | {"type": [*(kinds if isinstance(kinds, list) else [kinds]), "null"]}
    ways = shape.get("anyOf")
    if isinstance(ways, list):
        return shape | {"anyOf": [*ways, {"type": "null"}]}
    return {"anyOf": [shape, {"type": "null"}]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag(Field):
    """A boolean."""

    def shape(self) -> Json:
        """See `Field.shape`."""
        return {"type": "boolean"}

    def read(self, fields: Fields) -> bool | None:
        """Its value; None when absent."""
        return fields.flag(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Integer(Field):
    """An integer within [low, high]."""

    low: int
    high: int

    def shape(self) -> Json:
        """See `Field.shape`."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def read(self, fields: Fields) -> int | None:
        """Its value; None when absent."""
        return fields.integer(self.name, self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(Field):
    """A number within [low, high]."""

    low: float
    high: float

    def shape(self) -> Json:
        """See `Field.shape`."""
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def read(self, fields: Fields) -> float | None:
        """Its value; None when absent."""
        return fields.number(self.name, self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Name(Field):
    """A short string that is no prompt text."""

    most_chars: int

    def shape(self) -> Json:
        """See `Field.shape`."""
        return {"type": "string", "minLength": 1, "maxLength": self.most_chars}

    def read(self, fields: Fields) -> str | None:
        """Its value; None when absent."""
        return fields.name(self.name, most_chars=self.most_chars)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice(Field):
    """One of some strings."""

    allowed: tuple[str, ...]

    def shape(self) -> Json:
        """See `Field.shape`."""
        return {"enum": [*self.allowed]}

    def read(self, fields: Fields) -> str | None:
        """Its value; None when absent."""
        return fields.choice(self.name, self.allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner(Field):
    """An object with a table of its own."""

    table: Table

    def shape(self) -> Json:
        """See `Field.shape`."""
        return self.table.reference

    @property
    def tables(self) -> tuple[Table, ...]:
        """See `Field.tables`."""
        return (self.table,)

    def read(self, fields: Fields) -> Fields | None:
        """The object; None when absent."""
        value = fields.raw(self.name)
        return None if value is None else self.table.open(value, fields.path(self.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw(Field):
    """A value with a reader of its own, and the schema that this reader keeps to."""

    schema_: Mapping[str, object]
    holds: tuple[Table, ...] = ()

    def shape(self) -> Json:
        """See `Field.shape`."""
        return dict(self.schema_)

    @property
    def tables(self) -> tuple[Table, ...]:
        """See `Field.tables`."""
        return self.holds

    def read(self, fields: Fields) -> object:
        """The value as it came; None when absent."""
        return fields.raw(self.name)

    def optional(self) -> Raw:
        """The same field, where it may be absent."""
        return replace(self, required=False)


_KINDS: Final[dict[str, type]] = {
    "string": str,
    "object": dict,
    "array": list,
    "integer": int,
    "boolean": bool,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ignored(Field):
    """A field that changes nothing here. Only its type is looked at."""

    kind: str
    """`string`, `object`, `array`, `integer` or `boolean`."""

    def shape(self) -> Json:
        """See `Field.shape`."""
        return {"type": self.kind}

    def check(self, fields: Fields) -> None:
        """See `Field.check`."""
        value = fields.raw(self.name)
        if value is not None and type(value) is not _KINDS[self.kind]:
            article = "an" if self.kind[0] in "aio" else "a"
            problem = f"is {kind_of(value)}: must be {article} {self.kind}"
            raise RequestError(fields.path(self.name), problem)


@dataclass(frozen=True, kw_only=True, slots=True)
class Neutral(Field):
    """A field that would change the answer and is not served: only values that do not may come."""

    values: tuple[object, ...] = ()
    """None of them: the field has to be absent."""

    def shape(self) -> Json:
        """See `Field.shape`."""
        return {"enum": [*self.values]}

    def check(self, fields: Fields) -> None:
        """See `Field.check`."""
        value = fields.raw(self.name)
        if value is None or any(_same(value, ok) for ok in self.values):
            return
        allowed = " or ".join([*(_shown_neutral(ok) for ok in self.values), "absent"])
        # A string's content stays out: `suffix` is a part of the prompt.
        found = kind_of(value) if isinstance(value, str) else shown(value)
        problem = f"{found} is not supported: must be {allowed}"
        raise RequestError(fields.path(self.name), problem)


def _same(value: object, other: object) -> bool:
    """As JSON has it: 0 equals 0.0 and not False."""
    return isinstance(value, bool) is isinstance(other, bool) and value == other


def _shown_neutral(value: object) -> str:
    return repr(value) if isinstance(value, list | dict) else shown(value)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The fields of one object; `name` is what the document calls its schema."""

    name: str
    told: str
    fields: tuple[Field, ...]
    elsewhere: tuple[tuple[str, str], ...] = ()
    """(field, why it is not here): for names that callers may well try."""
    rule: Mapping[str, object] = dataclass_field(default_factory=dict)
    """What its readers ask of several fields together, as a part of its schema."""

    @property
    def reference(self) -> Json:
        """Where the document has its schema."""
        return {"$ref": f"#/components/schemas/{self.name}"}

    @cached_property
    def names(self) -> frozenset[str]:
        """Of all its fields."""
        return frozenset(self._named)

    @cached_property
    def _named(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    def open(self, data: object, path: str = "") -> Fields:
        """Begin to read an object.

        Raises:
            RequestError: it is none, has a field that the table has not, or a wrong value in one
                that nothing reads.
        """
        fields = Fields(data, path, known=self.names)
        for key in fields.names():
            field = self._named.get(key)
            if field is None:
                raise self._unknown(fields, key)
            field.check(fields)
        return fields

    def _unknown(self, fields: Fields, key: str) -> RequestError:
        path = fields.path(key if _PLAIN_KEY.fullmatch(key) else shown(key))
        why = dict(self.elsewhere).get(key)
        if why is not None:
            return RequestError(path, f"{why}: must be absent")
        near = difflib.get_close_matches(key[:64], sorted(self.names), n=1)
        if near:
            return RequestError(path, f"is an unknown field: did you mean {near[0]!r}?")
        if len(self.names) <= _FEW:
            return RequestError(path, f"is an unknown field: must be {one_of(sorted(self.names))}")
        return RequestError(path, "is an unknown field: must be one of those in /openapi.json")

    def schema(self) -> Json:
        """Its JSON schema."""
        required = [field.name for field in self.fields if field.required]
        return {
            "type": "object",
            "description": self.told,
            "properties": {field.name: field.schema() for field in self.fields},
            **({"required": required} if required else {}),
            "additionalProperties": False,
            **self.rule,
        }
