"""`long_json`: JSON of megabytes, written in a thread and in pieces, while others are served.

`json.dumps` holds the interpreter until it is done, a second for ten megabytes on a Zen 4 core: run
in the event loop, or whole in a thread, every stream would stand still for that long.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Final

_LEVELS: Final = 5
"""Of objects and lists that are written child by child: an answer's, down to one token."""

_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


async def long_json(make: Callable[[], object]) -> bytes:
    """What `make` gives, made and written in a thread.

    Raises:
        ValueError: it holds a number that JSON has no word for.
    """
    return await asyncio.to_thread(lambda: _pieces(make(), _LEVELS).encode())


def _pieces(value: object, levels: int) -> str:
    if levels and isinstance(value, dict):
        pairs = (f"{_to_json(str(key))}:{_pieces(one, levels - 1)}" for key, one in value.items())
        return f"{{{','.join(pairs)}}}"
    if levels and isinstance(value, list):
        return f"[{','.join(_pieces(one, levels - 1) for one in value)}]"
    return _to_json(value)
