"""A device's signing key is replaced over the link itself, while requests go on.

`stage` makes the new key beside the old one; the daemon does the rest when it sees it. Every
gateway that lives learns the new key, said by the old one, and takes both; then the device keeps
the new one as its own; then it confirms that, and the gateways forget the old one. What is on the
disk says how far it got, so a daemon that dies anywhere goes on at its next start:

    device.next.key is not device.key    both keys may be registered; the old one is in use
    device.next.key is device.key        the new one is in use, and not confirmed everywhere
    no device.next.key                   nothing is under way
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidegate.errors import IdentityError, TidegateError, UnavailableError
from tidegate.link import statements
from tidegate.link.core_thread import to_its_end
from tidegate.link.device_keys import confirmation, confirmed, registered, succession
from tidegate.link.device_views import GatewayView
from tidegate.link.effects import InboundRequest
from tidegate.link.identity import DeviceIdentity, load_device
from tidegate.link.keyfiles import (
    passphrase_from_environment,
    read_key,
    read_public,
    write_secret,
)
from tidegate.link.registry import DeviceRecord, DeviceRegistry
from tidegate.link.wrapping import PassphraseSource, is_plain, is_wrapped

logger = logging.getLogger(__name__)

STAGED = "device.next.key"
REGISTER, CONFIRM = b"tidegate/1 next key\0", b"tidegate/1 key in use\0"
"""Begin a request's body; a call is JSON, which begins otherwise."""
CHECK_S = 5.0
"""Between looks at whether a new key was made: one `stat`."""
RETRY_S = 60.0
_DEADLINE_S = 30.0


class Link(Protocol):
    """What a rotation needs of a `DeviceLink`."""

    def request(
        self, body: bytes, *, deadline_s: float, gateway: str
    ) -> AsyncGenerator[bytes, None]: ...

    async def gateways(self) -> Sequence[GatewayView]: ...

    async def use_key(self, key: Ed25519PrivateKey) -> None: ...


def stage(folder: Path, *, passphrase: PassphraseSource = passphrase_from_environment) -> bool:
    """Make the key that comes next; False when one is under way already.

    It is wrapped as the one in use is. The daemon may be running.

    Raises:
        IdentityError: there is no device, or a command prints its key.
    """
    current = read_public(folder / "device.key")
    if not is_plain(current) and not is_wrapped(current):
        raise IdentityError(
            f"{folder / 'device.key'}: a command prints it; make the new key where it is kept"
        )
    if (folder / STAGED).exists():
        return False
    _write(folder / STAGED, Ed25519PrivateKey.generate(), current, passphrase)
    return True


def _write(path: Path, key: Ed25519PrivateKey, before: bytes, passphrase: PassphraseSource) -> None:
    """Keep `key`, wrapped where the file `before` it was."""
    secret = passphrase() if is_wrapped(before) else None
    write_secret(path, key.private_bytes_raw(), passphrase=secret)


class KeyRotation:
    """Brings a key that was staged in a device's folder into use.

    Args:
        folder: the device's.
        link: that runs on this folder.
        passphrase: of wrapped keys.
        check_s: between looks for a new key.
    """

    def __init__(
        self,
        folder: Path,
        link: Link,
        *,
        passphrase: PassphraseSource = passphrase_from_environment,
        check_s: float = CHECK_S,
    ) -> None:
        self._folder, self._link = folder, link
        self._passphrase, self._check_s = passphrase, check_s

    async def run(self) -> None:
        """Rotate whenever a key was staged, until cancelled."""
        while True:
            wait_s = self._check_s
            if (self._folder / STAGED).exists():
                try:
                    await self.rotate()
                except TidegateError as error:
                    logger.warning("signing key not replaced yet: %s; trying again", error)
                    wait_s = RETRY_S * random.uniform(0.5, 1.0)
                else:
                    logger.info("signing key replaced")
            await asyncio.sleep(wait_s)

    async def rotate(self) -> None:
        """Bring the staged key into use at every gateway that lives.

        Raises:
            IdentityError: a gateway refuses or a key cannot be read; either key goes on working.
            UnavailableError: there is no gateway, or one does not answer; the same.
        """
        # Unwrapping takes a while, which the requests under way must not notice.
        identity, new = await asyncio.to_thread(self._read)
        if identity.key.private_bytes_raw() != new.private_bytes_raw():
            proof = succession(identity.key, new, identity.device_id)
            await self._tell_all(REGISTER + proof, new)
            current = self._folder / "device.key"
            await asyncio.to_thread(_write, current, new, read_public(current), self._passphrase)
        await self._link.use_key(new)
        await self._tell_all(CONFIRM + confirmation(new, identity.device_id), new)
        (self._folder / STAGED).unlink()

    def _read(self) -> tuple[DeviceIdentity, Ed25519PrivateKey]:
        """Who we are, with the key in use, and the key that comes next."""
        staged = read_key(self._folder / STAGED, passphrase=self._passphrase)
        identity = load_device(self._folder, passphrase=self._passphrase)
        return identity, Ed25519PrivateKey.from_private_bytes(staged)

    async def _tell_all(self, body: bytes, new: Ed25519PrivateKey) -> None:
        """Tell every gateway that lives, those that come meanwhile included."""
        told: set[str] = set()
        while missing := {one.gateway_id for one in await self._link.gateways()} - told:
            for gateway_id in sorted(missing):
                await self._tell(gateway_id, body, new.public_key().public_bytes_raw())
            told |= missing
        if not told:
            raise UnavailableError("no gateway is known")

    async def _tell(self, gateway_id: str, body: bytes, key: bytes) -> None:
        answer = b""
        request = self._link.request(body, deadline_s=_DEADLINE_S, gateway=gateway_id)
        try:
            async with aclosing(request) as parts:
                async for part in parts:
                    answer += part
        except TidegateError as error:
            raise UnavailableError(f"gateway {gateway_id}: {error}") from error
        try:
            fields = json.loads(answer)
            if "refused" in fields:
                raise IdentityError(
                    f"gateway {gateway_id}: refused: {statements.text(fields, 'refused')}"
                )
            same = statements.hexadecimal(fields, "key", len(key)) == key
        except (ValueError, TypeError, AttributeError):
            same = False
        if not same:
            raise IdentityError(f"gateway {gateway_id}: its answer is none; is it too old?")


class KeyRegistrar:
    """A gateway's handler that takes new keys of devices and leaves the rest to another.

    Args:
        handler: for every other request.
        registry: of the same gateway; the caller closes it.
    """

    def __init__(
        self,
        handler: Callable[[InboundRequest], AsyncIterator[bytes]],
        registry: DeviceRegistry,
    ) -> None:
        self._handler, self._registry = handler, registry
        self._one_at_a_time = asyncio.Lock()

    def __call__(self, request: InboundRequest) -> AsyncIterator[bytes]:
        for prefix, change in ((REGISTER, registered), (CONFIRM, confirmed)):
            if request.body.startswith(prefix):
                said = request.body.removeprefix(prefix)
                return self._answer(request, partial(_changed, change=change, said=said))
        return self._handler(request)

    async def _answer(
        self, request: InboundRequest, change: Callable[[DeviceRecord], DeviceRecord]
    ) -> AsyncIterator[bytes]:
        try:
            async with self._one_at_a_time:
                record = await to_its_end(self._registry.change_key, request.device_id, change)
        except IdentityError as error:
            yield statements.canonical_json({"refused": str(error)})
            return
        newest = record.next_key or record.public_key
        yield statements.canonical_json({"key": newest.hex()})


def _changed(
    record: DeviceRecord, *, change: Callable[[DeviceRecord, bytes], DeviceRecord], said: bytes
) -> DeviceRecord:
    return change(record, said)
