"""A device's way to its gateways, from its folder of keys: a broker, HTTP, or both in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tidegate.errors import ConfigError
from tidegate.link.broker_access import CheckMode, device_transport
from tidegate.link.broker_tls import TlsFiles
from tidegate.link.device_paths import DevicePaths
from tidegate.link.identity import load_device
from tidegate.link.path_choice import PATIENCE_S, PathTiming
from tidegate.link.transport import Transport


def device_way(
    broker: str | None,
    keys: Path,
    *,
    check: CheckMode = "auto",
    http: Sequence[str] = (),
    http_after_s: float = PATIENCE_S,
    plain: bool = False,
) -> Transport:
    """How the device whose keys lie in `keys` reaches its gateways.

    Args:
        broker: see `BrokerUrl.parse`; None for HTTP alone.
        keys: its folder, with TLS files or without.
        check: whether to look at the broker first.
        http: URLs of gateways; with a broker they are used while it is of no use.
        http_after_s: without the broker before they are, and with it before it is gone back to.
        plain: allow `http://` to other machines.

    Raises:
        IdentityError: the keys cannot be used.
        ConfigError: a URL or a TLS file cannot, or there is neither a broker nor a URL.
    """
    if broker is not None and not http:
        return device_transport(broker, keys, check=check)
    if not http:
        raise ConfigError("link", None, "a broker's URL, or a gateway's with --link-http")
    # What speaks HTTP is only there where it is used.
    from tidegate.link.http_device import HttpTransport

    direct = HttpTransport(
        http, partial(load_device, keys), files=TlsFiles.in_folder(keys), plain=plain
    )
    if broker is None:
        return direct
    timing = PathTiming(patience_s=http_after_s, steady_s=http_after_s)
    return DevicePaths(device_transport(broker, keys, check=check), direct, timing=timing)
