"""What waits at the gateway for one device that reads over HTTP, within bounds of bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from tidegate.errors import ConfigError
from tidegate.link.http_access import NumberWindow
from tidegate.link.http_frames import BEAT, Frame, Kind

BEAT_S = 5.0
"""A stream with nothing to say says so this often."""
_BATCH_BYTES = 64 * 1024
"""What is written at once; a single larger frame goes alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubLimits:
    """Bounds; a device beyond them is refused, a message beyond them is lost.

    Raises:
        ConfigError: a bound is not positive.
    """

    most_devices: int = 256
    """Each is one or two connections: the usual limit of a process is 1024 open files."""
    device_bytes: int = 1024 * 1024
    """That wait for one device: ten of the largest messages."""
    all_bytes: int = 64 * 1024 * 1024
    """That wait for all of them, as in `transport.QUEUE_BYTES`."""

    def __post_init__(self) -> None:
        for name in ("most_devices", "device_bytes", "all_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"link.http.{name}", getattr(self, name), "at least 1")


class Waiting:
    """The bytes that wait for all devices together."""

    def __init__(self) -> None:
        self.all_bytes = 0


class DeviceStream:
    """Frames for one device, and which numbers it has sent under."""

    def __init__(self, handle: str, challenge: bytes, waiting: Waiting) -> None:
        self.handle = handle
        self.challenge = challenge
        self.numbers = NumberWindow()
        self.waiting_bytes = 0
        self._waiting = waiting
        self._frames: deque[bytes] = deque()
        self._something = asyncio.Event()
        self._ended = False

    def put(self, frame: bytes) -> None:
        """Add a frame; whoever adds it has looked at the bounds. Nothing is added after the end."""
        if self._ended:
            return
        self._frames.append(frame)
        self._count(len(frame))
        self._something.set()

    def end(self, code: str, *, keep: bool) -> None:
        """Let it say goodbye with `code`, and nothing without one; `keep` what waits before it."""
        if not code or not keep:
            self._frames.clear()
            self._count(-self.waiting_bytes)
        if code:
            self.put(Frame(Kind.BYE, code.encode("ascii")).encode())
        self._ended = True
        self._something.set()

    async def take(self, beat_s: float = BEAT_S) -> bytes:
        """The next frames, a beat when there are none in time, nothing after the end."""
        try:
            async with asyncio.timeout(beat_s):
                await self._something.wait()
        except TimeoutError:
            return BEAT.encode()
        taken = bytearray()
        while self._frames and (not taken or len(taken) + len(self._frames[0]) <= _BATCH_BYTES):
            taken += self._frames.popleft()
        self._count(-len(taken))
        if not self._frames and not self._ended:
            self._something.clear()
        return bytes(taken)

    def _count(self, added_bytes: int) -> None:
        self.waiting_bytes += added_bytes
        self._waiting.all_bytes += added_bytes
