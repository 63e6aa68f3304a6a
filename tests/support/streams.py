"""A streamed chat over real HTTP, read chunk by chunk, for tests that do something meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


def chat(said: str, **fields: object) -> dict[str, object]:
    """The body of a greedy chat."""
    return {"messages": [{"role": "user", "content": said}], "temperature": 0, **fields}


@dataclass(kw_only=True)
class Stream:
    """What has come so far."""

    _lines: Iterator[str]
    text: str = ""
    chunks: list[Any] = field(default_factory=list)
    done: bool = False

    def read(self, texts: int | None = None) -> None:
        """Read until so many more chunks with text came; to the end for None."""
        came = 0
        while texts is None or came < texts:
            line = next(self._lines, None)
            if line is None or line == "data: [DONE]":
                self.done = line is not None
                return
            if not line.startswith("data: "):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            self.chunks.append(chunk)
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                self.text += piece
                came += bool(piece)

    @property
    def route(self) -> str:
        return str(self.chunks[0]["tidegate"]["route"])

    @property
    def usage(self) -> Any:
        return self.chunks[-1]["usage"]


@contextmanager
def streamed(
    url: str,
    body: dict[str, object],
    *,
    timeout_s: float = 60.0,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Stream]:
    """Begin a streamed chat; leaving the block hangs up."""
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    with (
        httpx.Client(timeout=timeout_s, headers=headers) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=asked) as response,
    ):
        assert response.status_code == 200, response.read()
        yield Stream(_lines=response.iter_lines())
