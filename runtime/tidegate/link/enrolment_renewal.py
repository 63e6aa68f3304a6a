"""Certificates are renewed over the link itself, at two thirds of their life.

The request is a sealed request like any other, so the device's key signs it and the gateway has
looked the device up. The TLS key is new every time; handle, id and signing key stay. What arrives
is staged as one file first: a device that dies between two files goes on with it at its next start.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

from tidegate.errors import IdentityError, TidegateError
from tidegate.link import statements
from tidegate.link.certificate_facts import renewal_due_s
from tidegate.link.certificates import make_request
from tidegate.link.certificates_store import BROKER_CA, BROKER_CERTIFICATE, BROKER_KEY, FACTS
from tidegate.link.core_thread import to_its_end
from tidegate.link.effects import InboundRequest
from tidegate.link.enrolment import Granted, check_granted
from tidegate.link.enrolment_gateway import Enrolment
from tidegate.link.identity import load_device
from tidegate.link.keyfiles import read_public, read_secret, write_atomic

logger = logging.getLogger(__name__)

PREFIX = b"tidegate/1 renew\0"
"""Begins a request's body; a call is JSON, which begins otherwise."""
RETRY_S = 3600.0
_DEADLINE_S = 60.0
_ASLEEP_S = 3600.0
"""The clock is looked at this often, since it may be set meanwhile."""
_NEW_KEY, _NEW_REQUEST, _STAGED = "renewing.key", "renewing.csr", "renewing.json"


class Asks(Protocol):
    """What renewal needs of a `DeviceLink`."""

    def request(self, body: bytes, *, deadline_s: float) -> AsyncGenerator[bytes, None]: ...


class CertificateRenewal:
    """Keeps the broker certificate in a device's folder fresh; does nothing where there is none."""

    def __init__(
        self, folder: Path, link: Asks, *, wall_s: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._link, self._wall_s = folder, link, wall_s
        self._identity = load_device(folder)

    async def run(self) -> None:
        """Renew when it is due, until cancelled."""
        install(self._folder)
        if not (self._folder / BROKER_CERTIFICATE).exists():
            return
        while True:
            wait_s = self.due_in_s()
            if wait_s <= 0:
                wait_s = await self._try()
            await asyncio.sleep(min(wait_s, _ASLEEP_S))

    def due_in_s(self) -> float:
        """Seconds until renewal; 0 or less when it is due."""
        return renewal_due_s(read_public(self._folder / BROKER_CERTIFICATE)) - self._wall_s()

    async def _try(self) -> float:
        try:
            await self.renew()
        except TidegateError as error:
            logger.warning("certificate not renewed: %s; trying again within the hour", error)
            return RETRY_S * random.uniform(0.5, 1.0)
        logger.info("certificate renewed")
        return 0.0

    async def renew(self) -> None:
        """Renew now.

        Raises:
            IdentityError: the gateway refuses, or what it sent is not for us.
            TidegateError: as `DeviceLink.request`.
        """
        key_pem, csr_pem = self._new_key()
        answer = b""
        async with aclosing(self._link.request(PREFIX + csr_pem, deadline_s=_DEADLINE_S)) as parts:
            async for part in parts:
                answer += part
        granted = self._open(answer)
        check_granted(granted, self._identity.root, key_pem, now_s=self._wall_s())
        staged = {
            BROKER_CA: granted.authorities_pem.decode("ascii"),
            BROKER_KEY: key_pem.decode("ascii"),
            BROKER_CERTIFICATE: granted.certificate_pem.decode("ascii"),
            FACTS: granted.facts.hex(),
        }
        write_atomic(self._folder / _STAGED, json.dumps(staged).encode())
        install(self._folder)

    def _new_key(self) -> tuple[bytes, bytes]:
        """The key and request under way, or new ones: a repeated request has the same answer."""
        key, request = self._folder / _NEW_KEY, self._folder / _NEW_REQUEST
        if not (key.exists() and request.exists()):
            csr_pem, key_pem = make_request(self._identity.handle)
            write_atomic(key, key_pem)
            write_atomic(request, csr_pem)
        return read_secret(key), read_public(request)

    def _open(self, answer: bytes) -> Granted:
        try:
            fields = json.loads(answer)
            if "refused" in fields:
                raise IdentityError(f"renewal: refused: {statements.text(fields, 'refused')}")
            return Granted(
                group=self._identity.group,
                gateway_id="",
                device_id=self._identity.device_id,
                handle=self._identity.handle,
                certificate_pem=statements.text(fields, "certificate").encode("ascii"),
                authorities_pem=statements.text(fields, "authorities").encode("ascii"),
                facts=bytes.fromhex(statements.text(fields, "facts")),
            )
        except (ValueError, TypeError, AttributeError):
            raise IdentityError("renewal: the gateway's answer is none; can it enrol?") from None


def install(folder: Path) -> None:
    """Put staged files in place, however far an earlier try got; does nothing without any."""
    staged = folder / _STAGED
    if staged.exists():
        fields = json.loads(read_secret(staged))
        write_atomic(folder / FACTS, bytes.fromhex(fields[FACTS]))
        for name in (BROKER_CA, BROKER_KEY, BROKER_CERTIFICATE):
            write_atomic(folder / name, fields[name].encode("ascii"))
        for name in (_NEW_REQUEST, _NEW_KEY, _STAGED):
            (folder / name).unlink(missing_ok=True)


class RenewingHandler:
    """A gateway's handler that answers renewals itself and leaves the rest to another.

    Args:
        handler: for every other request.
        enrolment: of the same gateway; the caller closes it.
    """

    def __init__(
        self,
        handler: Callable[[InboundRequest], AsyncIterator[bytes]],
        enrolment: Enrolment,
    ) -> None:
        self._handler, self._enrolment = handler, enrolment
        self._one_at_a_time = asyncio.Lock()

    def __call__(self, request: InboundRequest) -> AsyncIterator[bytes]:
        if request.body.startswith(PREFIX):
            return self._renew(request)
        return self._handler(request)

    async def _renew(self, request: InboundRequest) -> AsyncIterator[bytes]:
        csr_pem = request.body.removeprefix(PREFIX)
        try:
            async with self._one_at_a_time:
                granted = await to_its_end(self._enrolment.renew, request.device_id, csr_pem)
        except IdentityError as error:
            yield statements.canonical_json({"refused": str(error)})
            return
        fields = {
            "certificate": granted.certificate_pem.decode("ascii"),
            "authorities": granted.authorities_pem.decode("ascii"),
            "facts": granted.facts.hex(),
        }
        yield statements.canonical_json(fields)

    async def keep_own(self) -> None:
        """Renew the gateway's own broker certificate when it is due, until cancelled."""
        while True:
            async with self._one_at_a_time:
                await to_its_end(self._enrolment.renew_own)
            await asyncio.sleep(_ASLEEP_S)
