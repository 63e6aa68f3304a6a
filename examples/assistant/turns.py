"""One question and its answer, the unit that every task makes and every measurement counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question, its only right answer, and how hard it is: tier 0 (small talk) to 4."""

    tier: int
    kind: str
    question: str
    answer: str
    held_out: bool = False


def compact_json(value: Any) -> str:
    """Render an action as the assistant writes it: one line, no spaces."""
    return json.dumps(value, separators=(",", ":"))
