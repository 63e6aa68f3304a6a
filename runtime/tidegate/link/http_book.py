"""The HTTP addresses that gateways name in their signed adverts, kept for when no broker tells.

`gateways.json` in a device's folder: a gateway's name and its URL. Nothing in it is secret or
believed: what answers there still has to show a certificate and a signed advert.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tidegate.errors import ConfigError, IdentityError
from tidegate.link.device_views import GatewayView
from tidegate.link.http_url import HttpUrl
from tidegate.link.keyfiles import read_public, write_atomic
from tidegate.link.topics import check_name

logger = logging.getLogger(__name__)
FILE = "gateways.json"
LOOK_S = 5.0
"""Between looks at the gateways that live."""
MOST_KNOWN = 8


class Link(Protocol):
    """What tells of gateways: a `DeviceLink`."""

    async def gateways(self) -> Sequence[GatewayView]: ...


class Learner(Protocol):
    """What wants to know: an `HttpTransport`."""

    def learn(self, urls: Sequence[str]) -> None: ...


class HttpBook:
    """The addresses in a device's folder; a file that is damaged counts as empty.

    Args:
        folder: of the device's keys.
        plain: take `http://` from an advert, too.
    """

    def __init__(self, folder: Path, *, plain: bool = False) -> None:
        self._path, self._plain = folder / FILE, plain
        self._known: dict[str, str] = {}
        if self._path.exists():
            self._known = self._read()

    @property
    def urls(self) -> tuple[str, ...]:
        """Of every gateway that is known, the last one heard last."""
        return tuple(self._known.values())

    def hear(self, views: Sequence[GatewayView]) -> bool:
        """Take in what live gateways say of themselves now; True, and written, on a change."""
        known = dict(self._known)
        for view in views:
            known.pop(view.gateway_id, None)
            if self._fit(view.http):
                known[view.gateway_id] = view.http
        while len(known) > MOST_KNOWN:
            del known[next(iter(known))]
        if known == self._known:
            return False
        self._known = known
        try:
            write_atomic(self._path, json.dumps(known, indent=2, sort_keys=True).encode())
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", self._path, error.strerror)
        return True

    async def keep(self, link: Link, learner: Learner) -> None:
        """Follow what the gateways say, until cancelled."""
        while True:
            if self.hear(await link.gateways()):
                learner.learn(self.urls)
            await asyncio.sleep(LOOK_S)

    def _fit(self, url: str) -> bool:
        """Without TLS only where that was asked for: not even to our own machine, unasked."""
        if not url:
            return False
        try:
            return HttpUrl.parse(url, plain=True).tls or self._plain
        except ConfigError:
            return False

    def _read(self) -> dict[str, str]:
        try:
            fields = json.loads(read_public(self._path))
            return {
                check_name("gateway", name): url
                for name, url in list(fields.items())[:MOST_KNOWN]
                if isinstance(url, str) and self._fit(url)
            }
        except (ValueError, AttributeError, RecursionError, IdentityError, ConfigError):
            logger.warning("%s: damaged; gateways are learned anew", self._path)
            return {}
