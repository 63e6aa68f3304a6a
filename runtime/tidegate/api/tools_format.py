"""How models write their calls: one table of the forms, and the grammar that holds a model to one.

A form is found by what the bundle's chat template says. Every call is the function's name and its
arguments as JSON, between marks of the form; an answer is text, then calls, then nothing. In `auto`
the text is free until the mark that opens a call, and from there on it is a call that can be made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from llguidance import LLMatcher

from tidegate.api.tools import Tool, Tools
from tidegate.engine.grammar_schema import check_schema
from tidegate.engine.grammar_source import GrammarLimits, reason_of, schema_source, schema_text
from tidegate.engine.request import Constraint
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolForm:
    """The pieces of `begin` `name` `middle` arguments `tail` (`between` ...) `close`."""

    begin: str
    """The mark that opens a call; text before it is free."""
    head: str
    """From there to the name."""
    middle: str
    tail: str
    between: str | None
    """From one call to the name of the next; None where an answer has one call."""
    close: str = ""
    anywhere: bool = True
    """A call may follow text. Otherwise it is the whole answer, which `begin` alone decides."""


HERMES: Final = ToolForm(
    begin="<tool_call>",
    head='\n{"name": "',
    middle='", "arguments": ',
    tail="}\n</tool_call>",
    between='\n<tool_call>\n{"name": "',
)
LLAMA3: Final = ToolForm(
    begin="{",
    head='"name": "',
    middle='", "parameters": ',
    tail="}",
    between=None,
    anywhere=False,
)
MISTRAL: Final = ToolForm(
    begin="[TOOL_CALLS]",
    head='[{"name": "',
    middle='", "arguments": ',
    tail="}",
    between=', {"name": "',
    close="]",
)

_SIGNS: Final[tuple[tuple[str, ToolForm | None], ...]] = (
    ("<function=", None),
    ("[ARGS]", None),
    ("[TOOL_CALLS]", MISTRAL),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA3),
    ("Environment: ipython", LLAMA3),
)
"""What in a chat template tells its form; the first that is there decides, None is not supported.
A template that says nothing gets `HERMES`, which is also what we describe to models without one."""


def form_of(text: TextModel) -> ToolForm:
    """The form of a model's calls.

    Raises:
        RequestError: its template writes calls in a way that is not supported.
    """
    for sign, form in _SIGNS:
        if sign in text.template_source:
            if form is None:
                problem = f"this model's calls have a form that is not supported ({sign})"
                raise RequestError("tools", problem)
            return form
    return HERMES


def visible_ids(form: ToolForm, text: TextModel) -> frozenset[int]:
    """Special tokens that belong to the form, so that its marks show in the answer's text."""
    ids = (text.marks.get(mark) for mark in (form.begin, form.close))
    return frozenset(token for token in ids if token is not None)


def tools_constraint(tools: Tools, form: ToolForm, text: TextModel) -> Constraint:
    """The grammar of an answer that may call, or has to. Takes milliseconds for large schemas.

    Raises:
        RequestError: a schema that has to be kept cannot be enforced, or they are too long.
    """
    offered = tools.offered
    # Before anything reads them: to see what can be enforced takes seconds for megabytes.
    size, most = (
        sum(len(tool.parameters.encode()) for tool in offered),
        GrammarLimits().source_bytes,
    )
    if size > most:
        problem = f"parameters of {size} bytes: must be at most {most}"
        raise RequestError("tools", problem, status=413)
    lines = [f"fn{index}: {line}" for index, line in _functions(tools, form, text)]
    names = " | ".join(f"fn{index}" for index in range(len(offered)))
    spell = _speller(text)
    call = f"({names}) {spell(form.tail)}"
    more = f" ({spell(form.between)} {call})*" if form.between and tools.parallel else ""
    calls = f"{spell(form.head)} {call}{more} {spell(form.close)}"
    lines += [f"calls: {calls}", *_start(tools, form, text)]
    return Constraint(kind="grammar", source="\n".join(lines), name="tools")


def _start(tools: Tools, form: ToolForm, text: TextModel) -> Iterator[str]:
    """The rules of the whole answer."""
    mark = text.marks.get(form.begin)
    begin = _speller(text)(form.begin)
    if tools.mode == "required":
        yield f"start: {begin} calls"
    elif not form.anywhere:
        yield f"start: TEXT | {begin} calls"
        yield f"TEXT: /([^{form.begin}](.|\\n)*)?/"
    elif mark is None:
        # The shortest text that ends with the mark: from there on there is no way back.
        yield "start: text | opened calls"
        yield f"opened[lazy]: TEXT {begin}"
        yield "text: TEXT"
        yield "TEXT: /(.|\\n)*/"
    else:
        # Marks that are tokens are no text to the matcher; others than ours may still be said.
        free = sorted(set(text.plain_marks.values()) - {mark, *_ids(form, text)})
        yield f"start: text | text {begin} calls"
        yield f"text: ({' | '.join(['TEXT', *(f'<[{token}]>' for token in free)])})*"
        yield "TEXT: /(.|\\n)+/"


def _ids(form: ToolForm, text: TextModel) -> set[int]:
    pieces = f"{form.head}{form.tail}{form.between}{form.close}"
    return {token for mark, token in text.marks.items() if mark in pieces}


def _functions(tools: Tools, form: ToolForm, text: TextModel) -> Iterator[tuple[int, str]]:
    """For every function its name to its arguments, as a rule's body."""
    places = {tool.name: place for place, tool in enumerate(tools.tools)}
    for index, tool in enumerate(tools.offered):
        schema = _enforced(tool, places[tool.name], must=tools.mode == "required" or tool.strict)
        named = json.dumps(tool.name + form.middle)
        yield index, f"{named} %json {schema_text(schema)}"


def _enforced(tool: Tool, place: int, *, must: bool) -> object:
    """What the arguments are held to: their schema, or any object where that is only a wish.

    OpenAI's functions are not `strict` unless they say so: the model then does its best.
    """
    name = f"tools[{place}].function.parameters"
    schema = json.loads(tool.parameters)
    try:
        check_schema(schema, name=name, most_nested=GrammarLimits().nesting)
        problem = LLMatcher.validate_grammar(schema_source(schema))
        if problem:
            raise RequestError(name, f"cannot be enforced: {reason_of(problem)}")
    except RequestError:
        if must:
            raise
        return {"type": "object"}
    return {"type": "object", **schema}


def _speller(text: TextModel) -> Callable[[str], str]:
    """Turns a piece into Lark: marks that are tokens by their id, the rest as it is."""

    def spell(piece: str) -> str:
        parts, rest = [], piece
        while rest:
            found = [(rest.find(mark), mark) for mark in text.marks if mark in rest]
            at, mark = min(found, default=(len(rest), ""))
            if at:
                parts.append(json.dumps(rest[:at]))
            if mark:
                parts.append(f"<[{text.marks[mark]}]>")
            rest = rest[at + len(mark) :]
        return " ".join(parts)

    return spell
