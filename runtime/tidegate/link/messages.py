"""What the two ends say inside the envelope: a request's preamble, answer bundles, controls.

Fixed big-endian structs; every parser checks sizes before it slices and fails with `ValueError`,
which its caller counts as a message that could not be opened::

    Call     have u32 | credit u16 | ttl_ms u32 | proof[32] | body
    Bundle   first u32 | status u8 | count u16 | (len u32 | payload) * count | code, ASCII
    Control  kind u8 | have u32 | credit u16 | seen u64 | rewind u8

Payloads are numbered from 0 by the answer, not by the attempt: that number is what makes a
repeated delivery visible after a resend, a rewind or a restart of either end.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

_CALL = struct.Struct(">IHI32s")
_BUNDLE = struct.Struct(">IBH")
_CONTROL = struct.Struct(">BIHQB")
_ITEM_HEAD_BYTES = 4

MAX_PAYLOAD_BYTES = 64 * 1024
"""One payload of an answer."""
MAX_BUNDLE_BYTES = 80 * 1024
"""All payloads of one sealed message with their length fields."""
MAX_BUNDLE_PAYLOADS = 1024
MAX_CODE_BYTES = 64
BUNDLE_OVERHEAD_BYTES = _BUNDLE.size + MAX_CODE_BYTES
"""What a bundle may need beside its payloads and their length fields."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""All payloads of one answer."""
PROOF_BYTES = 32
CALL_BYTES = _CALL.size


class Status(IntEnum):
    """How far an answer is. Anything but MORE travels in a chunk sealed as FINAL."""

    MORE = 0
    COMPLETE = 1
    FAILED = 2


class ControlKind(IntEnum):
    """What a control asks for."""

    ACK = 1
    DONE = 2
    """The whole answer is stored by the device: the gateway may forget it."""
    CANCEL = 3


class Prefix:
    """What was received of an answer, as a proof that another end can compare with its own.

    The last payload is told apart from those before it: it alone may differ between two runs,
    and only if the answer ends there, because the event that ends an answer carries times.
    """

    def __init__(self, payloads: Iterable[bytes] = ()) -> None:
        self._before = hashlib.sha256()
        self._last = b""
        for payload in payloads:
            self.add(payload)

    def add(self, payload: bytes) -> None:
        """One more payload."""
        self._before.update(self._last)
        self._last = hashlib.sha256(payload).digest()

    def proof(self) -> bytes:
        """`PROOF_BYTES`: 16 of all payloads but the last, then 16 of the last."""
        return self._before.digest()[:16] + self._last[:16].ljust(16, b"\0")


def same_but_last(proof: bytes, other: bytes) -> bool:
    """Two proofs of equally many payloads agree on all of them but the last."""
    return proof[:16] == other[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The device's request: it has `have` payloads and waits `ttl_ms` ms for the rest.

    `proof` is `Prefix.proof` of what it has, so that no other answer is spliced to it.
    """

    have: int
    credit: int
    ttl_ms: int
    proof: bytes = bytes(PROOF_BYTES)
    body: bytes = field(repr=False)

    def encode(self) -> bytes:
        return _CALL.pack(self.have, self.credit, self.ttl_ms, self.proof) + self.body

    @classmethod
    def decode(cls, data: bytes) -> Call:
        if len(data) < _CALL.size:
            raise ValueError("call")
        have, credit, ttl_ms, proof = _CALL.unpack_from(data)
        body = data[_CALL.size :]
        return cls(have=have, credit=credit, ttl_ms=ttl_ms, proof=proof, body=body)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """Payloads `first`, `first + 1`, ...; none at all is a sign of life.

    When `status` is not MORE, `first + len(payloads)` is the length of the whole answer and
    `code` is the error's stable name (FAILED only).
    """

    first: int
    payloads: tuple[bytes, ...] = field(default=(), repr=False)
    status: Status = Status.MORE
    code: str = ""

    @property
    def end(self) -> int:
        return self.first + len(self.payloads)

    def encode(self) -> bytes:
        parts = [_BUNDLE.pack(self.first, self.status, len(self.payloads))]
        for payload in self.payloads:
            parts += (len(payload).to_bytes(_ITEM_HEAD_BYTES, "big"), payload)
        parts.append(self.code.encode("ascii")[:MAX_CODE_BYTES])
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Bundle:
        if len(data) < _BUNDLE.size:
            raise ValueError("bundle")
        first, status, count = _BUNDLE.unpack_from(data)
        if count > MAX_BUNDLE_PAYLOADS:
            raise ValueError("bundle.count")
        at = _BUNDLE.size
        payloads = []
        for _ in range(count):
            start = at + _ITEM_HEAD_BYTES
            at = start + int.from_bytes(data[at:start], "big")
            if at > len(data):
                raise ValueError("bundle.payload")
            payloads.append(data[start:at])
        if len(data) - at > MAX_CODE_BYTES:
            raise ValueError("bundle.code")
        code = data[at:].decode("ascii")
        if bool(code) != (status == Status.FAILED):
            raise ValueError("bundle.code")
        return cls(first=first, payloads=tuple(payloads), status=Status(status), code=code)


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """Cumulative acknowledgement: payloads below `have` need not be sent again.

    `seen` is one more than the highest chunk number opened in this attempt. With `rewind` the
    device says that something below it is missing; the gateway goes back to `have`.
    """

    kind: ControlKind
    have: int
    credit: int
    seen: int
    rewind: bool = False

    def encode(self) -> bytes:
        return _CONTROL.pack(self.kind, self.have, self.credit, self.seen, self.rewind)

    @classmethod
    def decode(cls, data: bytes) -> Control:
        if len(data) != _CONTROL.size:
            raise ValueError("control")
        kind, have, credit, seen, rewind = _CONTROL.unpack(data)
        if rewind > 1:
            raise ValueError("control.rewind")
        return cls(kind=ControlKind(kind), have=have, credit=credit, seen=seen, rewind=bool(rewind))


def bundle_from(
    payloads: list[bytes], first: int, room_bytes: int = MAX_BUNDLE_BYTES
) -> tuple[bytes, ...]:
    """As many of `payloads[first:]` as fit in one sealed message with `room_bytes`, at least one.

    A single payload always fits in a message, if need be in a larger one.
    """
    taken: list[bytes] = []
    for payload in payloads[first : first + MAX_BUNDLE_PAYLOADS]:
        room_bytes -= len(payload) + _ITEM_HEAD_BYTES
        if room_bytes < 0 and taken:
            break
        taken.append(payload)
    return tuple(taken)
