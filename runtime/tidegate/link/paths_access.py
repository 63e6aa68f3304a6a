"""A device's way to its gateways, from its folder of keys: a broker, HTTP, or both in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tidegate.errors import ConfigError
from tidegate.link.broker_access import CheckMode, device_transport
from tidegate.link.broker_tls import TlsFiles
from tidegate.link.device_paths import DevicePaths
from tidegate.link.http_book import HttpBook, Link
from tidegate.link.http_device import HttpTransport
from tidegate.link.identity import load_device
from tidegate.link.path_choice import PATIENCE_S, PathTiming
from tidegate.link.transport import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceWay:
    """What carries a device's link, and the addresses that it learns."""

    transport: Transport
    book: HttpBook | None
    learner: HttpTransport | None

    async def learn(self, link: Link) -> None:
        """Follow what gateways say of their addresses, until cancelled; `link` runs on this way."""
        if self.book is not None and self.learner is not None:
            await self.book.keep(link, self.learner)


def device_way(
    broker: str | None,
    keys: Path,
    *,
    check: CheckMode = "auto",
    http: Sequence[str] = (),
    http_after_s: float = PATIENCE_S,
    learn: bool = True,
    plain: bool = False,
) -> DeviceWay:
    """How the device whose keys lie in `keys` reaches its gateways.

    Args:
        broker: see `BrokerUrl.parse`; None for HTTP alone.
        keys: its folder, with TLS files or without.
        check: whether to look at the broker first.
        http: URLs of gateways; with a broker they are used while it is of no use.
        http_after_s: without the broker before they are, and with it before it is gone back to.
        learn: use what gateways name in their adverts, too.
        plain: allow `http://` to other machines.

    Raises:
        IdentityError: the keys cannot be used.
        ConfigError: a URL or a TLS file cannot, or there is neither a broker nor a URL.
    """
    book = HttpBook(keys, plain=plain) if learn else None
    known = () if book is None else book.urls
    if broker is None and not (http or known):
        raise ConfigError("link", None, "a broker's URL, or a gateway's with --link-http")
    if broker is not None and not http and book is None:
        transport = device_transport(broker, keys, check=check)
        return DeviceWay(transport=transport, book=None, learner=None)
    files = TlsFiles.in_folder(keys)
    direct = HttpTransport(http, partial(load_device, keys), files=files, plain=plain)
    direct.learn(known)
    if broker is None:
        return DeviceWay(transport=direct, book=book, learner=direct)
    timing = PathTiming(patience_s=http_after_s, steady_s=http_after_s)
    paths = DevicePaths(device_transport(broker, keys, check=check), direct, timing=timing)
    return DeviceWay(transport=paths, book=book, learner=direct)
