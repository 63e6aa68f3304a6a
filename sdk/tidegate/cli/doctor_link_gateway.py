"""What `tidegate doctor link` asks of a gateway: its advert, taken at its own time, an answer."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from tidegate.errors import IdentityError, UnavailableError
from tidegate.link import statements
from tidegate.link.device import DeviceLink
from tidegate.link.gateway_revocation import NONE_REVOKED, Revocations
from tidegate.link.identity import DeviceIdentity
from tidegate.link.mqtt_connection import Access, Connection
from tidegate.link.prekeys import Advert, open_advert
from tidegate.link.topics import Topics
from tidegate.link.transport import EventQueue, Message, Transport

REVOKED_KEY = "on the fleet's list of revoked ones"
_DEADLINE_S = 15.0
_NO_CALL = b"{}"
"""A body that no gateway takes for a call: it answers that, and no model runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvertFacts:
    """A verified advert, valid when it was signed, and when we heard it by our own clock."""

    advert: Advert
    heard_s: float
    retained: bool


async def hear_advert(
    access: Access, who: DeviceIdentity, *, wait_s: float, revoked: Revocations = NONE_REVOKED
) -> AdvertFacts | None:
    """The first advert that is valid now, else the last that the fleet signed, else None.

    One by a key that is `revoked` counts as none of the fleet's.

    Raises:
        UnavailableError: the broker is gone.
        IdentityError: there are adverts, and none is signed by this fleet.
    """
    queue = EventQueue()
    connection = Connection(access, queue)
    heard: AdvertFacts | None = None
    refused: IdentityError | None = None
    try:
        await connection.open()
        await connection.subscribe([Topics(who.group).every_advert])
        async with asyncio.timeout(wait_s):
            async for event in queue.events():
                if not isinstance(event, Message):
                    continue
                try:
                    heard = _open(event, who, revoked)
                except IdentityError as error:
                    refused = error
                    continue
                if not event.retained or _is_current(heard):
                    return heard
    except TimeoutError:
        if heard is None and refused is not None:
            raise refused from None
    finally:
        await connection.close()
    return heard


def _is_current(heard: AdvertFacts) -> bool:
    return heard.advert.issued_s <= heard.heard_s < heard.advert.expires_s


def _open(message: Message, who: DeviceIdentity, revoked: Revocations) -> AdvertFacts:
    """Verify an advert at the time it names: how far our clock is from that is another question."""
    issued_s = _issued_s(message.payload)
    advert = open_advert(message.payload, root=who.root, group=who.group, now_s=issued_s)
    if revoked.revokes(advert.gateway_id, advert.certified_s):
        raise IdentityError(f"the key of gateway {advert.gateway_id} is {REVOKED_KEY}")
    return AdvertFacts(advert=advert, heard_s=time.time(), retained=message.retained)


def _issued_s(payload: bytes) -> int:
    """The time an advert names; nothing has verified it yet."""
    at = 2 + int.from_bytes(payload[:2], "big") + statements.SIGNATURE_BYTES
    try:
        return statements.integer(json.loads(payload[at:]), "issued")
    except (ValueError, AttributeError):
        raise IdentityError("advert: cannot be read") from None


async def round_trip(transport: Transport, keys: Path) -> float:
    """Send a sealed request over `transport` and wait for the first sealed answer; seconds.

    Raises:
        TidegateError: it does not come, or the keys are in use.
    """
    link = DeviceLink(keys, transport)
    running = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(_DEADLINE_S):
            while not await link.gateways():
                await asyncio.sleep(0.02)
                if running.done():
                    raise UnavailableError("the link ended")
        began_s = time.monotonic()
        async with aclosing(link.request(_NO_CALL, deadline_s=_DEADLINE_S)) as answer:
            async for _ in answer:
                break
        return time.monotonic() - began_s
    except TimeoutError:
        raise UnavailableError("the link does not accept the gateway's advert") from None
    finally:
        running.cancel()
        await asyncio.wait([running])
        await link.close()
