"""Calls read out of an answer's text as it comes. Pure, one character at a time.

What does not turn out to be a call is text again, as it was: a wrong call never breaks an answer.
Once a function's name is whole the call is passed on, and its arguments as they are written; the
grammar that the model follows sees to it that they end well, unless its tokens run out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from typing import Final

from tidegate.api.tools import ToolDelta
from tidegate.api.tools_format import ToolForm

Piece = str | ToolDelta
_Machine = Generator[None, str, None]
_MOST_BLANKS: Final = 64
"""Held before a call; more of them are text."""


def call_id(request_id: str, index: int) -> str:
    """The same at every run of a request; nine letters and digits, which some templates demand."""
    return hashlib.sha256(f"{request_id}/{index}".encode()).hexdigest()[:9]


class ToolParser:
    """One answer. `calls` counts those that began."""

    def __init__(self, form: ToolForm, request_id: str) -> None:
        """Read an answer in `form`; `request_id` names its calls."""
        self.calls = 0
        self._form, self._request_id = form, request_id
        self._held = ""
        """Read, and not yet known to be text or a call."""
        self._text = ""
        self._arguments = ""
        self._said = self._inside = False
        self._pieces: list[Piece] = []
        self._machine = self._run()
        next(self._machine)

    def push(self, text: str) -> list[Piece]:
        """What is certain after `text`, in order."""
        for char in text:
            self._machine.send(char)
        self._settle()
        pieces, self._pieces = self._pieces, []
        return pieces

    def end(self) -> list[Piece]:
        """What is left once the answer has ended; white space after calls is nothing."""
        if not self._inside and (not self.calls or self._held.strip()):
            self._release()
        self._held = ""
        return self.push("")

    def _run(self) -> _Machine:
        while True:
            yield from self._prose()
            while (yield from self._call()):
                pass
            self._inside = False
            self._release()

    def _prose(self) -> _Machine:
        """Text, until `begin` is held, with the white space before it."""
        begin = self._form.begin
        while True:
            self._held += yield
            while self._held and not self._may_be(begin):
                self._say(self._held[0])
                self._held = self._held[1:]
            if not self._form.anywhere and (self._said or self.calls):
                self._release()
            elif self._held.lstrip() == begin:
                return

    def _may_be(self, begin: str) -> bool:
        """What is held may be the beginning of `begin`, with a few blanks before it.

        No more of them, or an answer of blanks would be held back and be read again and again.
        """
        blanks = len(self._held) - len(rest := self._held.lstrip())
        return blanks <= _MOST_BLANKS and begin.startswith(rest)

    def _call(self) -> Generator[None, str, bool]:
        """One call; whether another follows. What is held at its end was none."""
        if not (yield from self._expect(self._form.head if self._held else '{"name": "')):
            return False
        name = ""
        while not name.endswith('"'):
            name += yield
            self._held += name[-1]
        if not (yield from self._expect(self._form.middle[1:])):
            return False
        self._begin(name[:-1])
        yield from self._value()
        if not (yield from self._expect(self._form.tail)):
            return False
        self._held = ""
        if not self._form.close:
            return False
        char = yield from self._next()
        if char == ",":
            self._held = ""
            return True
        if char == self._form.close:
            self._held = ""
        return False

    def _expect(self, piece: str) -> Generator[None, str, bool]:
        """Whether `piece` comes, however much white space there is."""
        for wanted in piece:
            if not wanted.isspace() and (yield from self._next()) != wanted:
                return False
        return True

    def _next(self) -> Generator[None, str, str]:
        while True:
            char = yield
            self._held += char
            if not char.isspace():
                return char

    def _begin(self, name: str) -> None:
        self._settle()
        self._held = ""
        call = ToolDelta(index=self.calls, id=call_id(self._request_id, self.calls), name=name)
        self._pieces.append(call)
        self.calls += 1
        self._inside = True

    def _value(self) -> _Machine:
        """The arguments: everything to the end of their object."""
        depth, quoted, escaped = 0, False, False
        while True:
            char = yield
            if not depth and char.isspace():
                continue
            self._arguments += char
            if escaped:
                escaped = False
            elif quoted:
                quoted, escaped = char != '"', char == "\\"
            elif char == '"':
                quoted = True
            else:
                depth += (char in "{[") - (char in "}]")
            if depth <= 0 and not quoted:
                self._settle()
                return

    def _say(self, text: str) -> None:
        self._text += text
        self._said = self._said or bool(text.strip())

    def _release(self) -> None:
        """What was held is text after all."""
        self._say(self._held)
        self._held = ""

    def _settle(self) -> None:
        if self._text:
            self._pieces.append(self._text)
        if self._arguments:
            self._pieces.append(ToolDelta(index=self.calls - 1, arguments=self._arguments))
        self._text = self._arguments = ""
