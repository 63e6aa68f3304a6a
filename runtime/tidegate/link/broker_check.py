"""The look at a broker before it is used: may anyone here meddle with another handle's topics?

What goes through a broker is sealed either way; but whoever can read or write another's topics can
watch its traffic, delay it or fill its queue. A connection of its own, so a broker that hangs up on
forbidden acts costs nothing, tries what must be refused:

* reading: it subscribes to everybody's topics. A granted subscription proves nothing (mosquitto
  grants all and filters what it delivers), so what counts is what arrives. So that something
  could, a gateway keeps a retained message on the topic of a handle nobody has, and a device
  sends a request to a gateway nobody is;
* writing: MQTT 5 brokers say in the PUBACK whether a publish was allowed; some hang up instead.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tidegate.errors import LinkError, UnavailableError
from tidegate.link.memory import matches
from tidegate.link.mqtt_connection import Access, Connection
from tidegate.link.topics import Topics
from tidegate.link.transport import EventQueue, Message

logger = logging.getLogger(__name__)

CANARY_HANDLE = "canary"
"""Answers to it are nobody's: gateways keep a random retained message there."""
SETTLE_S = 0.3
"""After everything is acknowledged: what the broker still has to deliver arrives within this."""
_DOCS = "docs/deploy/mosquitto.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one end must not be able to do."""

    unreadable: tuple[str, ...]
    """Filters on which nothing may arrive, but for `own`."""
    own: tuple[str, ...]
    unwritable: tuple[str, ...]
    """Topics on which no publish may be allowed."""
    bait: tuple[str, ...] = ()
    """Topics to publish on, so that something could arrive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaches:
    """Topics that could be read or written, though they must not."""

    readable: tuple[str, ...]
    writable: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.readable or self.writable)

    def __str__(self) -> str:
        acts = [f"read {topic}" for topic in self.readable]
        acts += [f"write {topic}" for topic in self.writable]
        return ", ".join(acts)


def device_plan(group: str, handle: str) -> Plan:
    """A device may write its requests and its presence, and read its answers and adverts."""
    topics = Topics(group)
    nobody = f"check-{secrets.token_hex(8)}"
    return Plan(
        unreadable=(
            topics.response("+"),
            topics.response(CANARY_HANDLE),
            topics.request("+", "+"),
            topics.every_presence,
        ),
        own=(topics.response(handle), topics.presence(handle)),
        unwritable=(
            topics.response(nobody),
            topics.request(nobody, nobody),
            topics.presence(nobody),
            topics.advert(nobody),
        ),
        bait=(topics.request(nobody, handle),),
    )


def gateway_plan(group: str, gateway_id: str) -> Plan:
    """A gateway may write its advert and answers, and read its requests and presences."""
    topics = Topics(group)
    nobody = f"check-{secrets.token_hex(8)}"
    return Plan(
        unreadable=(topics.response("+"), topics.request("+", "+")),
        own=(topics.every_request(gateway_id),),
        unwritable=(topics.request(nobody, nobody), topics.advert(nobody)),
        bait=(topics.response(nobody),),
    )


async def check_broker(access: Access, plan: Plan) -> None:
    """Refuse a broker on which `plan` can be broken.

    Raises:
        LinkError: it can; says how, and how to mend it.
        UnavailableError: the broker cannot be reached.
    """
    breaches = await find_breaches(access, plan)
    if breaches:
        raise LinkError(
            f"this broker lets this client {breaches}: give it the access rules of {_DOCS}"
            " (`tidegate broker config` writes them), or start with --broker-check off"
        )


async def find_breaches(access: Access, plan: Plan) -> Breaches:
    """Try everything in `plan`.

    Raises:
        UnavailableError: the broker cannot be reached.
    """
    attempt = _Attempt(replace(access, mqtt5=True))
    try:
        return await attempt.find(plan)
    except UnavailableError:
        if not attempt.answered:
            raise
    finally:
        await attempt.close()
    # It may never have heard of MQTT 5.
    attempt = _Attempt(replace(access, mqtt5=False))
    try:
        found = await attempt.find(plan)
    finally:
        await attempt.close()
    logger.info("broker %s: only MQTT 3.1.1, which does not tell what may be written", access.url)
    return found


class _Attempt:
    """Connections, one after another, that try what must be refused; messages go to one queue."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._queue = EventQueue()
        self._connection = Connection(access, self._queue)

    @property
    def answered(self) -> bool:
        """The broker could be reached, whatever it then said."""
        return self._connection.answered

    async def close(self) -> None:
        await self._connection.close()

    async def find(self, plan: Plan) -> Breaches:
        await self._connection.open()
        alive = await self._listen(plan.unreadable)
        for topic in plan.bait:
            alive = alive and await self._allowed(topic) is not None
        writable = []
        for topic in plan.unwritable:
            if not alive:
                await self._connection.close()
                self._connection = Connection(self._access, self._queue)
                await self._connection.open()
            allowed = await self._allowed(topic)
            alive = allowed is not None
            if allowed and self._access.mqtt5:
                writable.append(topic)
        await asyncio.sleep(SETTLE_S)
        readable = {
            event.topic
            for event in self._queue.take_all()
            if isinstance(event, Message) and not _is_own(event.topic, plan)
        }
        return Breaches(readable=tuple(sorted(readable)), writable=tuple(writable))

    async def _listen(self, filters: Sequence[str]) -> bool:
        """Subscribe to each alone: one refusal must not hide another's grant; False if cut off."""
        try:
            for topic_filter in filters:
                await self._connection.subscribe([topic_filter])
        except UnavailableError:
            return False
        return True

    async def _allowed(self, topic: str) -> bool | None:
        """None when the broker hangs up instead of an answer, as some do at a forbidden publish."""
        try:
            return await self._connection.try_publish(topic, secrets.token_bytes(16))
        except UnavailableError:
            return None


def _is_own(topic: str, plan: Plan) -> bool:
    return any(matches(own, topic) for own in plan.own)
