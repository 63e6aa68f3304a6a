"""The listener of a gateway's HTTP path: its address, its TLS, and who dawdles on it."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Transport
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from uvicorn.protocols.http.h11_impl import H11Protocol

from tidegate.api.server import BoundServer
from tidegate.cloud.link_http import LinkHttp, LinkHttpTiming
from tidegate.errors import ConfigError, LinkError
from tidegate.link.http_door import HttpDoor
from tidegate.link.http_hub import HttpHub
from tidegate.link.http_stream import HubLimits
from tidegate.link.http_tls import HttpTls, has_certificate
from tidegate.link.http_url import HttpUrl, is_loopback

logger = logging.getLogger(__name__)
_RENEW_EVERY_S = 3600.0
_GONE_AFTER_S = 30.0
"""A peer that acknowledges nothing for so long has vanished: its answers go over the broker."""
_BESIDE_STREAMS = 64
MOST_PER_ADDRESS = 128
"""Connections: of sixty devices that share an address, as in a house behind a router."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkHttpSettings:
    """Where a gateway takes devices over HTTP."""

    host: str
    port: int
    names: tuple[str, ...] = ()
    """What devices call it by: its authority then makes a certificate for these."""
    url: str = ""
    """What adverts say that devices find it at; by default the first of `names`, if there are."""
    client_certificates: bool = False
    """Ask every device for its certificate of the fleet as well."""
    plain: bool = False
    """No TLS beyond this machine: a proxy in front of it does that."""
    most_per_address: int = MOST_PER_ADDRESS
    """Connections from one address, so that no one peer keeps all others out; 0 for any number, as
    behind a proxy, which is one address for everybody."""
    limits: HubLimits = field(default_factory=HubLimits)
    timing: LinkHttpTiming = field(default_factory=LinkHttpTiming)


class LinkHttpServer:
    """A hub with its listener, bound; `hub.run` serves.

    Args:
        keys: the gateway's folder.
        settings: where and how.

    Raises:
        ConfigError: the address is taken or strangers could listen in, or a certificate is unfit.
        IdentityError: the keys cannot be used, or there is no authority to make a certificate.
    """

    def __init__(self, keys: Path, settings: LinkHttpSettings) -> None:
        self._settings = settings
        if settings.url:
            HttpUrl.parse(settings.url, plain=settings.plain)
        if settings.most_per_address < 0:
            raise ConfigError("link.http.most_per_address", settings.most_per_address, "at least 0")
        tls = None
        if settings.names or has_certificate(keys):
            tls = HttpTls(keys, names=settings.names, clients=settings.client_certificates)
        elif settings.client_certificates:
            allowed = "used with a certificate: --link-http-name, or http-cert.pem in --keys"
            raise ConfigError("link.http.client_certificates", "on", allowed)
        elif not (is_loopback(settings.host) or settings.plain):
            allowed = (
                "this machine's own, or used with a certificate (--link-http-name), or with"
                " --link-http-plain behind a proxy that has one"
            )
            raise ConfigError("link.http", settings.host, allowed)
        door = HttpDoor(keys)
        self.hub = HttpHub(door.group, door.gateway_id, limits=settings.limits)
        self._app = LinkHttp(door, self.hub, timing=settings.timing)
        try:
            self._server = BoundServer(
                self._app,
                settings.host,
                settings.port,
                tls=None if tls is None else tls.context,
                # One connection to read and one to write; the rest is for those who come.
                most_connections=2 * settings.limits.most_devices + _BESIDE_STREAMS,
                gone_after_s=_GONE_AFTER_S,
                protocol=prompt_protocol(most_per_address=settings.most_per_address),
            )
        except ConfigError:
            door.close()
            raise
        self.hub.serve_with(self._server.run)
        if tls is not None:
            self._tls = tls
            self.hub.serve_with(self._renew)

    @property
    def public_url(self) -> str:
        """For adverts; empty when nobody has said how devices call it."""
        if self._settings.url:
            return str(HttpUrl.parse(self._settings.url, plain=self._settings.plain))
        if not self._settings.names:
            return ""
        port = self.url.rsplit(":", 1)[1]
        name = self._settings.names[0]
        return f"https://{f'[{name}]' if ':' in name else name}:{port}"

    @property
    def url(self) -> str:
        """Of the listener."""
        return self._server.url

    def report(self) -> Mapping[str, object]:
        """JSON for `/status`."""
        return {
            "url": self.url,
            "devices": len(self.hub.handles),
            "waiting_bytes": self.hub.waiting_bytes,
            "lost": self.hub.lost,
        }

    async def close(self) -> None:
        """Give the port back. Call it after `hub.run` has ended."""
        self._server.close()
        await self._app.close()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            try:
                if await asyncio.to_thread(self._tls.renew):
                    logger.info("the certificate of the HTTP path was renewed")
            except (LinkError, ConfigError) as error:
                logger.warning("the certificate of the HTTP path cannot be renewed: %s", error)


class PromptProtocol(H11Protocol):
    """uvicorn's protocol, for callers who do not dawdle.

    A connection on which no request has begun or ended between two looks, and none is under way, is
    closed: uvicorn itself waits for the first byte, and for the end of a header, for ever.
    """

    look_every_s = 15.0
    most_per_address = 0
    of_address: Counter[str]
    """Connections that are open, of one listener: see `prompt_protocol`."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._seen: object = object()
        self._look = self.loop.call_later(self.look_every_s, self._look_again)
        self._address = "" if self.client is None else self.client[0]
        self.of_address[self._address] += 1
        if 0 < self.most_per_address < self.of_address[self._address]:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._look.cancel()
        self.of_address[self._address] -= 1
        if not self.of_address[self._address]:
            del self.of_address[self._address]
        super().connection_lost(exc)

    def _look_again(self) -> None:
        cycle = self.cycle
        idle = cycle is None or cycle.response_complete
        if idle and (cycle is None or self._seen is cycle):
            self.transport.close()
            return
        self._seen = cycle
        self._look = self.loop.call_later(self.look_every_s, self._look_again)


def prompt_protocol(*, most_per_address: int) -> type[PromptProtocol]:
    """The protocol of one listener, with a count of its own; 0: any number from one address."""
    members = {"most_per_address": most_per_address, "of_address": Counter[str]()}
    return type("ListenerProtocol", (PromptProtocol,), members)
