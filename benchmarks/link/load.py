"""The load of the link's benchmarks: prompts by number, and an echo that answers them.

The answer to a prompt is its words, one event a word, the same bytes at every run, so that what
arrives can be compared with what must arrive.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator

from echobackend import EchoBackend

from tidegate.api.wire import write_event
from tidegate.cloud.handler import read_call

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def body_of(number: int, words: int) -> bytes:
    """Request `number`, as a device seals it."""
    rng = random.Random(f"prompt {number}")
    said = ["".join(rng.choices(_LETTERS, k=rng.randint(2, 9))) for _ in range(words - 1)]
    call = {
        "model": "echo-1",
        "prompt": " ".join([f"request-{number}", *said]),
        "max_tokens": words + 1,
        "stream": True,
    }
    return json.dumps(call).encode()


def number_of(body: bytes) -> int:
    """Which request this is the body of."""
    prompt: str = json.loads(body)["prompt"]
    return int(prompt.split(" ", 1)[0].removeprefix("request-"))


async def answer_to(body: bytes, *, word_s: float = 0.0) -> AsyncIterator[bytes]:
    """The answer's payloads, one word every `word_s` seconds."""
    # A backend for each request: it counts what it has begun, and says so.
    async for event in EchoBackend(word_s=word_s).answer(read_call(body)):
        yield write_event(event)


async def expected_of(body: bytes) -> list[bytes]:
    """The whole answer, at once."""
    return [payload async for payload in answer_to(body)]
