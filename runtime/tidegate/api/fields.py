"""One JSON object read field by field: every wrong field is one `RequestError` that names it.

`null` counts as absent, as OpenAI's API has it. Errors show numbers, flags and names in short, and
never the text of a prompt: fields that hold one are read with `prose`, which shows only the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.errors import RequestError

_SHOWN_CHARS = 40

TOKEN_IDS: Final = 2**31 - 1
"""The largest token id that is read; the engine knows the vocabulary."""
TOKEN_ID: Final = {"type": "integer", "minimum": 0, "maximum": TOKEN_IDS}
"""The JSON schema of one."""


def shown(value: object) -> str:
    """`value` in a few words for an error message; containers only as their kind and length."""
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "...")
    if isinstance(value, int) and value.bit_length() > 63:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, int | float) else kind_of(value)


def kind_of(value: object) -> str:
    """What JSON calls `value`, with the length of a container; nothing of its content."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case _:
            return "no JSON value"


def one_of(names: Sequence[str]) -> str:
    """`'a', 'b' or 'c'`, the way error messages list choices."""
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def whole(value: object) -> int | None:
    """An integer as JSON has it, where 7 and 7.0 are the same; None for anything else."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return None


def token_ids(values: list[object], path: str) -> tuple[int, ...]:
    """Token ids, of which the engine knows which there are.

    Raises:
        RequestError: one is none; names its place.
    """
    found = []
    for index, value in enumerate(values):
        token = whole(value)
        if token is None or not 0 <= token <= TOKEN_IDS:
            what = kind_of(value) if isinstance(value, str) else shown(value)
            problem = f"{what}: must be a token id from 0 to {TOKEN_IDS}"
            raise RequestError(f"{path}[{index}]", problem)
        found.append(token)
    return tuple(found)


def prose(value: object, path: str) -> str:
    """Text that people wrote: any string of valid Unicode.

    Raises:
        RequestError: it is no string, or holds half a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(value, str):
        raise RequestError(path, f"is {kind_of(value)}: must be a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            problem = f"has half a surrogate pair at character {error.start}: must be valid Unicode"
            raise RequestError(path, problem) from None
    return value


class Fields:
    """A JSON object being read. `path` is what errors call it; every reader returns None if absent.

    Raises:
        RequestError: `data` is no object, or a field that is read is wrong.
    """

    def __init__(
        self, data: object, path: str = "", *, known: frozenset[str] | None = None
    ) -> None:
        """`known` are the fields that readers may ask for; see `tidegate.api.field_table`."""
        if not isinstance(data, dict):
            raise RequestError(path or "body", f"is {kind_of(data)}: must be a JSON object")
        self._data: dict[object, object] = data
        self._path = path
        self._known = known

    def path(self, name: str) -> str:
        """How errors call the field `name` of this object."""
        return f"{self._path}.{name}" if self._path else name

    def raw(self, name: str) -> object:
        """The field as it came; None when absent."""
        assert self._known is None or name in self._known, f"{name} is in no table"
        return self._data.get(name)

    def names(self) -> tuple[str, ...]:
        """The names of all fields, as JSON has them."""
        return tuple(str(name) for name in self._data)

    def only(self, *names: str) -> None:
        """Refuse any key but `names`."""
        for key in self._data:
            if key not in names:
                where = self._path or "body"
                raise RequestError(where, f"unknown key {shown(key)}: must be {one_of(names)}")

    def flag(self, name: str) -> bool | None:
        """A boolean."""
        value = self.raw(name)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(name, "true or false")

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer within [low, high]."""
        value = self.raw(name)
        if value is None:
            return None
        number = whole(value)
        if number is not None and low <= number <= high:
            return number
        raise self._wrong(name, f"an integer from {low} to {high}")

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number within [low, high]; never NaN."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        raise self._wrong(name, f"a number from {low:g} to {high:g}")

    def name(self, name: str, *, most_chars: int) -> str | None:
        """A short string that is no prompt text, such as a model's name."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, str) and 0 < len(value) <= most_chars:
            return prose(value, self.path(name))
        raise self._wrong(name, f"a string of 1 to {most_chars} characters")

    def choice(self, name: str, allowed: Sequence[str]) -> str | None:
        """One of `allowed`."""
        value = self.raw(name)
        if value is None or (isinstance(value, str) and value in allowed):
            return value
        raise self._wrong(name, one_of(allowed))

    def inner(self, name: str) -> Fields | None:
        """An object inside this one."""
        value = self.raw(name)
        return None if value is None else Fields(value, self.path(name))

    def _wrong(self, name: str, allowed: str) -> RequestError:
        return RequestError(self.path(name), f"{shown(self.raw(name))}: must be {allowed}")
