"""API keys: kept as hashes, compared in constant time.

A key is long and random (`new_key`), so one SHA-256 is enough to keep it: there is no dictionary
to try. What leaks from a config file or a core dump is then no key.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256

from tidegate.errors import ConfigError

_HASH = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    """A fresh API key of 256 random bits."""
    return "tg-" + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What a config keeps of `key`: 64 hex digits."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class KeyRing:
    """Lets a request pass that brings one of the keys; use it as `HttpSettings.authorise`.

    Raises:
        ConfigError: `hashes` is empty or one is not what `hash_key` returns.
    """

    def __init__(self, hashes: Iterable[str]) -> None:
        self._hashes = tuple(hashes)
        if not self._hashes:
            raise ConfigError("api_keys", "none", "at least one hash, or no key check at all")
        for one in self._hashes:
            if not _HASH.fullmatch(one):
                raise ConfigError("api_keys", one[:8] + "...", "64 hex digits, as of `hash_key`")

    def __call__(self, key: str | None) -> bool:
        """True if `key` is on the ring; the time taken does not say which, or how near."""
        offered = hash_key(key or "")
        matches = [hmac.compare_digest(offered, one) for one in self._hashes]
        return key is not None and any(matches)
