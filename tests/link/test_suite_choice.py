"""Both ends over a broker: which suite seals a request, and how it is cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from linkpair import linked

from tidegate.errors import ConfigError
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.envelope import MessageType
from tidegate.link.fleet import pair
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.suites import HYBRID, X25519
from tidegate.link.wire import MAX_MESSAGE_BYTES

SUITE_AT = 4


async def length(request: InboundRequest) -> AsyncIterator[bytes]:
    yield str(len(request.body)).encode()


@pytest.mark.parametrize(
    ("device", "gateway", "used"),
    [
        ((HYBRID, X25519), (HYBRID, X25519), HYBRID),
        ((X25519, HYBRID), (HYBRID, X25519), X25519),
        ((HYBRID, X25519), (X25519,), X25519),
        ((X25519,), (HYBRID, X25519), X25519),
        ((HYBRID,), (HYBRID,), HYBRID),
    ],
)
def test_the_first_suite_of_the_device_that_the_gateway_offers_seals_the_request(
    tmp_path: Path, device: Sequence[int], gateway: Sequence[int], used: int
) -> None:
    async def ask() -> set[int]:
        async with linked(tmp_path, length, device_suites=device, gateway_suites=gateway) as ends:
            answer = [part async for part in ends.device.request(b"four", deadline_s=10.0)]
            assert answer == [b"4"]
            requests = [one.payload for one in ends.broker.seen if "/q/" in one.topic]
            return {one[SUITE_AT] for one in requests if one[0] == MessageType.REQUEST}

    assert asyncio.run(ask()) == {used}


def test_a_gateway_without_an_allowed_suite_is_not_there(tmp_path: Path) -> None:
    async def wait() -> None:
        async with (
            asyncio.timeout(0.3),
            linked(tmp_path, length, device_suites=(HYBRID,), gateway_suites=(X25519,)),
        ):
            raise AssertionError("the device has found a gateway")

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_a_long_request_travels_in_messages_of_at_most_96_kib(tmp_path: Path) -> None:
    async def ask() -> list[bytes]:
        async with linked(tmp_path, length) as ends:
            answer = [part async for part in ends.device.request(bytes(300_000), deadline_s=10.0)]
            assert answer == [b"300000"]
            return [one.payload for one in ends.broker.seen if "/q/" in one.topic]

    sent = asyncio.run(ask())
    kinds = [one[0] for one in sent if one[0] != MessageType.CONTROL]
    assert kinds[:5] == [MessageType.REQUEST] + [MessageType.PART] * 4
    assert max(map(len, sent)) <= MAX_MESSAGE_BYTES


def test_suites_that_cannot_be_used_are_refused_before_anything_starts(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"link\.suites"):
            DeviceLink(tmp_path / "device", MemoryTransport(MemoryBroker()), suites=(9,))
