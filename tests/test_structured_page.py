"""docs/structured-output.md is true: its example is a request, and it names what is enforced."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from toytext import VOCAB, toy_text

from tidegate.api.schema import read_chat
from tidegate.engine.grammar import Grammars
from tidegate.engine.grammar_schema import ENFORCED
from tidegate.engine.grammar_source import GrammarLimits

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "structured-output.md").read_text("utf-8")


def test_the_example_of_the_page_is_a_request_with_a_shape_that_compiles() -> None:
    (body,) = re.findall(r"-d '(\{.*?\})'", PAGE, re.DOTALL)
    call = read_chat(json.loads(body))
    assert call.constraint is not None
    asyncio.run(Grammars(toy_text(), vocab=VOCAB).prepare(call.constraint))


def test_the_page_names_every_keyword_that_is_enforced() -> None:
    numbers = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}  # "the bounds"
    assert not [word for word in ENFORCED if word not in numbers and f"`{word}`" not in PAGE]


def test_the_page_names_the_limits() -> None:
    limits = GrammarLimits()
    said = (limits.source_bytes // 1024, limits.nesting, limits.kept, int(limits.compile_s))
    assert said == (64, 64, 64, 5)
    for words in ("64 KiB", "64\nschemas deep", "5 seconds to compile", "The last\n64 shapes"):
        assert words in PAGE
