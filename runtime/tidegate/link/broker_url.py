"""Where a broker is: `mqtt://` and `mqtts://` URLs, and what of them may be shown."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tidegate.errors import ConfigError

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerUrl:
    """Where the broker is. Its `str` and `repr` never show the password."""

    host: str
    port: int
    tls: bool
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Only this machine can reach it, so nobody else's topics are on it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def parse(cls, url: str) -> BrokerUrl:
        """Parse `mqtt://[user[:password]@]host[:port]` or `mqtts://...`.

        Raises:
            ConfigError: it is something else. The message never repeats the user part; a `#`, `?`
                or `/` in a password must be written as %23, %3F or %2F.
        """
        shown = f"...@{url.rsplit('@', 1)[-1]}" if "@" in url else url
        allowed = "mqtt://host[:port] or mqtts://host[:port], with a port from 1 to 65535"
        try:
            parts = urlsplit(url)
            port = _DEFAULT_PORTS.get(parts.scheme) if parts.port is None else parts.port
        except ValueError:
            # Its own text, and so the cause, may quote the password.
            raise ConfigError("broker", shown, allowed) from None
        odd = any(sign in url for sign in "#?\\") or not url.isprintable() or " " in url
        known = parts.scheme in _DEFAULT_PORTS
        if odd or not known or not port or not parts.hostname or parts.path not in ("", "/"):
            raise ConfigError("broker", shown, allowed)
        return cls(
            host=parts.hostname,
            port=port,
            tls=parts.scheme == "mqtts",
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )
