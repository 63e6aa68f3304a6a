"""The device daemon as a process, and clients that cost next to nothing.

`Daemon` starts `tidegate serve` and ends it. `stream_together` sends requests at once and reads
their streams in one thread with one selector, keeping bytes and times and looking at nothing until
all have ended, because a client on the same two cores takes its time from the engine.
"""

from __future__ import annotations

import json
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from peers.contract import PeerError

CACHE = "start-cache"
"""Beside a bundle: what one start keeps for the next; see `workers/tidegate_worker.py`."""

_TEXT = re.compile(rb'"(?:text|content)":"[^"]')
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_READ_BYTES = 1 << 16
_START_TIMEOUT_S = 120
_STREAM_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One answer: when each piece of text came, and how many tokens it had."""

    texts_s: tuple[float, ...]
    end_s: float
    tokens: int
    body: bytes = field(repr=False)


class Daemon:
    """`tidegate serve` on a free port of this machine, from `with` to its end."""

    def __init__(self, bundle: Path, flags: Sequence[str], log: Path) -> None:
        """Nothing starts before `with`."""
        tool = [sys.executable, "-P", "-m", "tidegate.cli", "serve", str(bundle)]
        self._command = [*tool, "--listen", "127.0.0.1:0", *flags]
        self._log = log
        self.port = 0
        self.began_s = 0.0

    def __enter__(self) -> Self:
        """Start and wait until it listens.

        Raises:
            PeerError: it ended instead; the log says why.
        """
        self.began_s = time.perf_counter()
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=out)
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line:
            raise PeerError(f"the daemon did not start: {self._log.read_text()[-2000:]}")
        self.port = int(line.rsplit(":", 1)[1])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ask it to drain, and wait."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def rss_mib(self) -> float:
        """Resident memory now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None, status
        return int(found[1]) / 1024


def completion(prompt: Sequence[int], max_tokens: int, **more: object) -> Mapping[str, object]:
    """A greedy, streamed request for exactly `max_tokens` tokens after token ids."""
    return {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


def stream_together(
    port: int, bodies: Sequence[Mapping[str, object]], path: str = "/v1/completions"
) -> list[Streamed]:
    """Send all requests, then read all answers to their ends.

    Raises:
        PeerError: an answer was no success, or did not end.
    """
    requests = [_request(port, path, body) for body in bodies]
    arrivals: list[list[tuple[float, bytes]]] = [[] for _ in bodies]
    deadline_s = time.perf_counter() + _STREAM_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        for number, request in enumerate(requests):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, number)
        while selector.get_map():
            if time.perf_counter() > deadline_s:
                raise PeerError(f"answers did not end within {_STREAM_TIMEOUT_S} s")
            for key, _ in selector.select(1.0):
                data = key.fileobj.recv(_READ_BYTES)  # type: ignore[union-attr]
                arrivals[key.data].append((time.perf_counter(), data))
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return [_read(one) for one in arrivals]


def _request(port: int, path: str, body: Mapping[str, object]) -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


def _read(arrivals: Sequence[tuple[float, bytes]]) -> Streamed:
    """What came when, found in all bytes at once: an event may lie across two reads."""
    body, starts = b"", []
    for _, data in arrivals:
        starts.append(len(body))
        body += data
    if not body.startswith(b"HTTP/1.1 200"):
        raise PeerError(f"the daemon answered {body[:500].decode(errors='replace')}")
    texts = [arrivals[bisect_right(starts, one.start()) - 1][0] for one in _TEXT.finditer(body)]
    tokens = _TOKENS.findall(body)
    return Streamed(
        texts_s=tuple(texts),
        end_s=arrivals[-1][0],
        tokens=int(tokens[-1]) if tokens else 0,
        body=body,
    )


def step_s(streams: Sequence[Streamed]) -> float:
    """Seconds per step while all streams ran: from the last first token to the first end.

    Only the few tokens outside that time are counted by their pieces of text, which may hold more
    than one; the others follow from the totals.
    """
    began_s = max(one.texts_s[0] for one in streams)
    ended_s = min(one.texts_s[-1] for one in streams)
    inside = 0
    for one in streams:
        before = sum(at <= began_s for at in one.texts_s)
        after = sum(at > ended_s for at in one.texts_s)
        inside += one.tokens - before - after
    if inside <= 0:
        raise PeerError("the streams did not run at the same time: give them more tokens")
    return (ended_s - began_s) * len(streams) / inside
