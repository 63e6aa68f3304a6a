"""Ways to make a message wrong: what a fuzzer does to bytes that were right."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

_INTERESTING = (0, 1, 2, 3, 4, 5, 9, 0x54, 0x7B, 0x7F, 0x80, 0xFE, 0xFF)
_HEAD_BYTES = 128
"""Where the fields are: half of all changes go there."""

Mutation = Callable[[random.Random, bytes, bytes], bytes]


def _place(rng: random.Random, message: bytes) -> int:
    end = min(len(message), _HEAD_BYTES) if rng.random() < 0.5 else len(message)
    return rng.randrange(max(1, end))


def flip_bit(rng: random.Random, message: bytes, _: bytes) -> bytes:
    at = _place(rng, message)
    return (
        message[:at]
        + bytes(byte ^ (1 << rng.randrange(8)) for byte in message[at : at + 1])
        + (message[at + 1 :])
    )


def set_byte(rng: random.Random, message: bytes, _: bytes) -> bytes:
    at = _place(rng, message)
    return message[:at] + bytes((rng.choice(_INTERESTING),)) + message[at + 1 :]


def set_integer(rng: random.Random, message: bytes, _: bytes) -> bytes:
    """Big-endian 2, 4 or 8 bytes near one of the ends of their range."""
    at, width = _place(rng, message), rng.choice((2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1, rng.getrandbits(16)))
    return message[:at] + value.to_bytes(width, "big") + message[at + width :]


def cut(rng: random.Random, message: bytes, _: bytes) -> bytes:
    return message[: rng.randrange(len(message) + 1)]


def remove(rng: random.Random, message: bytes, _: bytes) -> bytes:
    at = _place(rng, message)
    return message[:at] + message[at + rng.randrange(1, 40) :]


def insert(rng: random.Random, message: bytes, _: bytes) -> bytes:
    at = _place(rng, message)
    return message[:at] + rng.randbytes(rng.randrange(1, 40)) + message[at:]


def repeat(rng: random.Random, message: bytes, _: bytes) -> bytes:
    at = _place(rng, message)
    return message[:at] + message[at : at + rng.randrange(1, 200)] * 2 + message[at:]


def append(rng: random.Random, message: bytes, _: bytes) -> bytes:
    return message + rng.randbytes(rng.choice((1, 16, 64, 1000, 100_000)))


def splice(rng: random.Random, message: bytes, other: bytes) -> bytes:
    """The head of one, the tail of another, cut at the same place."""
    at = _place(rng, message)
    return message[:at] + other[at:]


def cross(rng: random.Random, message: bytes, other: bytes) -> bytes:
    """The head of one, the tail of another, cut anywhere."""
    return message[: _place(rng, message)] + other[_place(rng, other) :]


def replace(rng: random.Random, message: bytes, _: bytes) -> bytes:
    """Noise behind a head that may be right."""
    kept = rng.choice((0, 1, 27, 28, 31, 60, 111, 112, 124, 1199, 1200))
    return message[:kept] + rng.randbytes(rng.randrange(300))


_VALUES = re.compile(rb'"[^"]*"|-?[0-9.]+|\[|\{')
_NONSENSE = (
    b"-1",
    b"0.5",
    b"1e400",
    b"NaN",
    b"true",
    b"null",
    b"{}",
    b"[]",
    b'"\ud800"',
    b"9" * 400,
    b"9" * 5000,
    b"[" * 9000,
)


def json_value(rng: random.Random, text: bytes) -> bytes:
    """A value, or a key, of a JSON text becomes another one."""
    places = list(_VALUES.finditer(text))
    if not places:
        return text
    place = rng.choice(places)
    value = rng.choice((*_NONSENSE, rng.choice(places).group()))
    return text[: place.start()] + value + text[place.end() :]


MUTATIONS: Sequence[Mutation] = (
    flip_bit,
    set_byte,
    set_integer,
    cut,
    remove,
    insert,
    repeat,
    append,
    splice,
    cross,
    replace,
)


def mutate(rng: random.Random, message: bytes, other: bytes) -> tuple[str, bytes]:
    """One to three changes; the name of the first, and the result."""
    chosen = rng.choices(MUTATIONS, k=rng.choice((1, 1, 1, 2, 3)))
    for mutation in chosen:
        message = mutation(rng, message, other)
    return chosen[0].__name__, message
