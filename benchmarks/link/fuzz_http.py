"""What of the HTTP path reads others' bytes: frames, headers, and what a device signs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from link.mutations import mutate

from tidegate.errors import LinkError
from tidegate.link.fleet import pair
from tidegate.link.http_access import CHALLENGE_BYTES, header, read_header, sign_send, sign_stream
from tidegate.link.http_door import HttpDoor
from tidegate.link.http_frames import Frame, FrameSplitter, Kind, split
from tidegate.link.identity import load_device


class HttpReaders:
    """A gateway's door and right words of one of its devices."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        pair(folder / "device", folder / "gateway")
        device = load_device(folder / "device")
        challenge = rng.randbytes(CHALLENGE_BYTES)
        self._rng = rng
        self._door = HttpDoor(folder / "gateway")
        self._handle, self._challenge = device.handle, challenge
        self._body = b"".join(
            Frame(kind, rng.randbytes(rng.randrange(80))).encode() for kind in Kind
        )
        self._stream = sign_stream(device, self._door.gateway_id, challenge)
        self._send = sign_send(device, self._door.gateway_id, challenge, number=1, body=self._body)

    def close(self) -> None:
        self._door.close()

    def act(self) -> tuple[str, str, str]:
        """Read one mutated input: its target, the mutation, and what came of it.

        Raises:
            Exception: whatever is not a refusal by name.
        """
        readers: list[tuple[str, bytes, Callable[[bytes], object], bool]] = [
            ("http body", self._body, split, False),
            ("http stream", self._body, self._in_pieces, False),
            ("http header", header(self._handle, self._stream).encode(), self._header, False),
            ("http claim", self._stream, self._claim, True),
            ("http word", self._send, self._word, True),
        ]
        name, right, reads, is_signed = self._rng.choice(readers)
        mutation, data = mutate(self._rng, right, self._rng.choice(readers)[1])
        try:
            reads(data)
        except LinkError:
            return name, mutation, "refused"
        assert not is_signed or data == right, "a forged word passed"
        return name, mutation, "read"

    def _in_pieces(self, data: bytes) -> None:
        splitter, at = FrameSplitter(), 0
        while at < len(data):
            step = self._rng.randint(1, 40)
            splitter.feed(data[at : at + step])
            at += step

    def _header(self, data: bytes) -> None:
        read_header(data.decode("latin-1"))

    def _claim(self, data: bytes) -> None:
        self._door.open_stream(self._handle, data)

    def _word(self, data: bytes) -> None:
        self._door.take_send(self._handle, self._challenge, data, self._body)
