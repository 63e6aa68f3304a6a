"""An encoder whose run never ends: the service may be restarted for it, and can be closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from encodermodels import TINY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from toypool import ToyModels, started, toy_pool

from tidegate.api.encoder_model import EmbeddingModel, ServedAs
from tidegate.api.encoders import STALL_S, Encoders
from tidegate.api.lifecycle import STUCK_STATUS, exit_when_stuck
from tidegate.cloud.cloud_backend import CloudBackend
from tidegate.engine.text_batches import BatchLimits
from tidegate.errors import UnavailableError
from tidegate.model.encoder_use import EncoderUse
from tidegate.model.packed import Array


def test_the_watchdog_ends_a_service_whose_encoder_is_stuck() -> None:
    busy_s = 0.0
    left: list[int] = []

    async def main() -> None:
        nonlocal busy_s
        async with started(toy_pool(("one",), ToyModels())) as plain:
            encoders = Encoders(busy_s=lambda: busy_s)
            backend = CloudBackend(plain.pool, created_s=0, encoders=encoders)
            watch = asyncio.create_task(exit_when_stuck(backend, every_s=0.01, leave=left.append))
            await asyncio.sleep(0.1)
            assert left == []
            busy_s = STALL_S + 1
            async with asyncio.timeout(10):
                await watch
            assert backend.health().healthy  # `/health` asks the encoders itself
            assert "encoder" in backend.snapshot().detail

    asyncio.run(main())
    assert left == [STUCK_STATUS]


def test_encoders_may_have_a_watchdog_of_their_own() -> None:
    left: list[int] = []
    encoders = Encoders(busy_s=lambda: STALL_S + 1)
    asyncio.run(exit_when_stuck(encoders, every_s=0.01, leave=left.append))
    assert left == [STUCK_STATUS]
    assert Encoders().snapshot().healthy


class StuckEncoder:
    """Runs until its gate is open."""

    arch = TINY
    context_tokens = 16

    def __init__(self) -> None:
        self.gate, self.closed = threading.Event(), False

    def encode(self, texts: Sequence[Sequence[int]]) -> Array:
        assert self.gate.wait(20)
        return np.zeros((len(texts), TINY.outputs), np.float32)

    def close(self) -> None:
        self.closed = True


def test_a_stuck_encoder_is_left_behind_when_the_service_ends() -> None:
    encoder = StuckEncoder()
    served = ServedAs(
        model_id="stuck", created_s=0, limits=BatchLimits(rows=4, tokens=64, most_waiting=8)
    )

    async def main() -> None:
        tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
        model = EmbeddingModel(encoder, tokenizer, EncoderUse(scoring="none"), served)
        asking = asyncio.create_task(model.embed(((1, 2),)))
        while model.batcher.busy_s == 0:
            await asyncio.sleep(0.001)
        model.close(timeout_s=0.05)
        assert not encoder.closed, "its thread uses it"
        with pytest.raises(UnavailableError, match="shutting down"):
            await asking
        encoder.gate.set()
        model.close()
        assert encoder.closed

    asyncio.run(main())
