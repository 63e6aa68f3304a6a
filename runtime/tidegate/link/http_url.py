"""Where a gateway can be reached over HTTP, and when that may be without TLS."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from tidegate.errors import ConfigError

MOST_URL_CHARACTERS = 256
_PORTS = {"http": 80, "https": 443}
_ALLOWED = "https://host[:port][/path], or http:// on this machine"


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpUrl:
    """A gateway's address."""

    host: str
    port: int
    tls: bool
    path: str = ""
    """In front of the link's own paths; empty, or with a slash at its start and none at its end."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    @classmethod
    def parse(cls, url: str, *, plain: bool = False) -> HttpUrl:
        """Read a URL; `plain` allows http:// to other machines, where the network sees handles.

        Raises:
            ConfigError: it is none, has more than host, port and path, or wants TLS.
        """
        shown = f"...@{url.rsplit('@', 1)[-1]}" if "@" in url else url
        try:
            parts = urlsplit(url)
            port = _PORTS.get(parts.scheme) if parts.port is None else parts.port
        except ValueError:
            raise ConfigError("link.http", shown, _ALLOWED) from None
        odd = any(sign in url for sign in "#?\\@%") or not url.isprintable() or " " in url
        if odd or not port or not parts.hostname or parts.scheme not in _PORTS:
            raise ConfigError("link.http", shown, _ALLOWED)
        if not url.isascii() or len(url) > MOST_URL_CHARACTERS:
            allowed = f"at most {MOST_URL_CHARACTERS} characters of ASCII"
            raise ConfigError("link.http", shown[:MOST_URL_CHARACTERS], allowed)
        parsed = cls(
            host=parts.hostname,
            port=port,
            tls=parts.scheme == "https",
            path=parts.path.rstrip("/"),
        )
        if not (parsed.tls or parsed.loopback or plain):
            allowed = "https:// beyond this machine, or used with --link-http-plain"
            raise ConfigError("link.http", shown, allowed)
        return parsed
