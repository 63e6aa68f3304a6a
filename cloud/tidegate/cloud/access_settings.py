"""Settings of keys, limits, usage and audit, and the `AccessControl` that they describe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from tidegate.api.keys import KeyRing
from tidegate.cloud.access import AccessControl
from tidegate.cloud.api_keys import ApiKeyStore
from tidegate.cloud.audit import AuditLog, AuditSettings
from tidegate.cloud.charges import Ledger, MemoryLedger
from tidegate.cloud.price_table import PriceTable
from tidegate.cloud.usage import LEAST_DAYS, UsageBook
from tidegate.errors import ConfigError
from tidegate.link.keyfiles import FolderLock

if TYPE_CHECKING:
    from tidegate.cloud.windows import Windows

_SCHEMES: Final = ("redis", "rediss")


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessSettings:
    """Where keys, usage and audit are, and where limits are counted.

    Raises:
        ConfigError: the URL is not Redis's, or usage is not kept for long enough.
    """

    state: Path
    redis: str | None = field(default=None, repr=False)
    """Its URL, with the password in it if there is one; None counts in this process."""
    audit: AuditSettings | None = field(default_factory=AuditSettings)
    metrics_per_key: bool = False
    metrics_need_key: bool = False
    usage_days: int | None = 400
    """How long rows of usage are kept, a year and a month; None for ever."""
    prices: PriceTable = field(default_factory=PriceTable)
    """Of models, for keys without prices of their own."""
    client_keys: bool = False
    """The name of a client's certificate stands for the key of that name."""

    def __post_init__(self) -> None:
        if self.usage_days is not None and self.usage_days < LEAST_DAYS:
            allowed = f"at least {LEAST_DAYS}, or 0 to keep them for ever"
            raise ConfigError("usage-days", self.usage_days, allowed)
        if self.redis is None:
            return
        parts = urlsplit(self.redis)
        if parts.scheme not in _SCHEMES or not parts.hostname:
            # No value is shown: a password may be in it.
            raise ConfigError("limits-redis", "...", "redis://HOST:PORT/DB or rediss://...")

    @property
    def open_paths(self) -> tuple[str, ...]:
        """What needs no key."""
        probes = ("/health", "/ready", "/openapi.json")
        return probes if self.metrics_need_key else (*probes, "/metrics")


def open_access(
    settings: AccessSettings,
    *,
    key_hashes: Sequence[str],
    clock: Callable[[], float] = time.time,
    ticks: Callable[[], float] = time.monotonic,
) -> AccessControl:
    """Open the state folder. Without Redis one service at a time may use it.

    Args:
        settings: what to open.
        key_hashes: of the keys without rules.
        clock: Unix seconds.
        ticks: seconds that only go forward, for what flows into buckets.

    Raises:
        LinkError: another service uses the folder, or what is in it is not ours.
        ConfigError: a hash is none.
    """
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Services that count in Redis may share a folder.
    lock = FolderLock(settings.state) if settings.redis is None else None
    return AccessControl(
        keys=ApiKeyStore(settings.state),
        usage=UsageBook(settings.state),
        ledger=MemoryLedger(clock=ticks)
        if settings.redis is None
        else _redis_ledger(settings.redis),
        audit=None if settings.audit is None else AuditLog(settings.state, settings.audit),
        windows=_windows(settings.redis),
        plain=KeyRing(key_hashes) if key_hashes else None,
        per_key=settings.metrics_per_key,
        client_keys=settings.client_keys,
        prices=settings.prices,
        usage_days=settings.usage_days,
        clock=clock,
        release=None if lock is None else lock.release,
    )


def _redis_ledger(redis: str) -> Ledger:
    from tidegate.cloud.redis_ledger import RedisLedger

    return RedisLedger(redis)


def _windows(redis: str | None) -> Callable[[], Windows]:
    def make() -> Windows:
        from tidegate.cloud.windows import Windows

        return Windows(redis)

    return make
