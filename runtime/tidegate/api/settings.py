"""Settings of the HTTP surface, validated on construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidegate.api.admission import Admission
from tidegate.api.keys import KeyRing
from tidegate.api.tracing import Tracer
from tidegate.errors import ConfigError

Authorise = Callable[[str | None], bool]
"""Given the bearer token of a request, None if it has none: may it pass? May raise CapacityError.

`tidegate.api.keys.KeyRing` is one.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSettings:
    """Bounds of one HTTP surface.

    Raises:
        ConfigError: a bound is not positive.
    """

    body_limit_bytes: int = 2 << 20
    """Larger request bodies are refused with 413, while they are read."""
    body_timeout_s: float = 30.0
    """A body that has not come whole by then is refused with 408."""
    write_timeout_s: float = 60.0
    """A reader that takes nothing for so long is given up and its call cancelled."""
    heartbeat_s: float = 15.0
    """A stream without an event for so long sends a comment."""
    max_calls: int = 256
    """Calls in flight; more are refused with 429. The engine's queue is the finer bound."""
    status: bool = False
    """Serve `/status`, which shows load and routes; off where strangers can reach the port."""
    authorise: Authorise | None = None
    """Checked on every path but the open ones; None lets everyone in."""
    admission: Admission | None = None
    """Decides instead of `authorise` where keys have scopes and limits of their own."""
    open_paths: tuple[str, ...] = ("/health", "/ready", "/metrics", "/openapi.json")
    """Probes and scrapers bring no key, and these paths show no request; the document is public."""
    tracer: Tracer | None = None
    """Hears of every request but those of open paths; None traces nothing."""
    allowed_hosts: tuple[str, ...] = ()
    """Names the `Host` header may have, no port; empty allows all. A service on loopback sets it:

    a web page whose own name was rebound to 127.0.0.1 then gets 403 instead of answers.
    """

    def __post_init__(self) -> None:
        for name in (
            "body_limit_bytes",
            "body_timeout_s",
            "write_timeout_s",
            "heartbeat_s",
            "max_calls",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "above 0")


LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def surface_for(
    host: str,
    *,
    key_hashes: Sequence[str],
    admission: Admission | None = None,
    mutual_tls: bool = False,
) -> HttpSettings:
    """The settings of a service on `host`: private by address, or by key.

    On loopback the `Host` header must name it, so that a web page rebound to 127.0.0.1 gets
    nothing. Anywhere else callers need a key. `/status` is then never open to strangers.
    `admission` looks after the keys itself, those of `key_hashes` included. With `mutual_tls` it is
    private by its clients' certificates.

    Raises:
        ConfigError: `host` is not loopback and there are no keys.
    """
    authorise = KeyRing(key_hashes) if key_hashes else None
    if host in LOOPBACK_NAMES:
        return HttpSettings(
            status=True, authorise=authorise, admission=admission, allowed_hosts=LOOPBACK_NAMES
        )
    if authorise is None and admission is None and not mutual_tls:
        allowed = f"one of {', '.join(LOOPBACK_NAMES)}, or any with --api-key-file"
        raise ConfigError("listen", host, allowed)
    return HttpSettings(status=True, authorise=authorise, admission=admission)
