"""Server-sent events as bytes, both ways; no I/O.

Only what the OpenAI stream uses: `data:` lines, comments, and a blank line that ends an event.
(WHATWG HTML, section 9.2, "Server-sent events".)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from tidegate.errors import UnavailableError

DONE: Final = b"data: [DONE]\n\n"
"""Ends an answer that went well; after an error event the stream just closes."""

HEARTBEAT: Final = b": waiting\n\n"
"""A comment: keeps proxies and readers with a timeout from giving up during a long prefill."""


# Kept, because `json.dumps` with options builds an encoder for every call.
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(data: object) -> bytes:
    """One event that carries `data` as JSON, which has no line break of its own."""
    return b"data: " + _to_json(data).encode() + b"\n\n"


class Decoder:
    """Bytes in, the `data` of whole events out; holds at most `most_bytes` of an unfinished line.

    `feed` raises UnavailableError when the peer exceeds that: it speaks no SSE.
    """

    def __init__(self, *, most_bytes: int = 1 << 20) -> None:
        self._most_bytes = most_bytes
        self._rest = b""
        self._data: list[str] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the data of every event that `chunk` completes.

        Raises:
            UnavailableError: an event is longer than the bound or not UTF-8.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) + self._data_bytes > self._most_bytes:
            raise UnavailableError(f"an event of the stream is over {self._most_bytes} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                self._line(line)
            elif self._data:
                yield "\n".join(self._data)
                self._data, self._data_bytes = [], 0

    def _line(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name != b"data":
            return
        self._data_bytes += len(value)
        if self._data_bytes > self._most_bytes:
            raise UnavailableError(f"an event of the stream is over {self._most_bytes} bytes")
        try:
            self._data.append(value.removeprefix(b" ").decode())
        except UnicodeDecodeError:
            raise UnavailableError("an event of the stream is not UTF-8") from None
