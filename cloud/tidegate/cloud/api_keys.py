"""API keys with rules of their own: one SQLite file in the service's state folder.

A key is 256 random bits, so there is no dictionary to try and nothing for a slow hash to slow down:
one HMAC-SHA256 under a local 0600 key (the pepper) is enough, and costs microseconds for every
request, whoever sends it. A copied file alone cannot even tell whether a key is in it. The look-up
is by that digest: its time may depend on the digest's bits, which only the pepper can aim.

Every request looks its key up again, so that what another process adds or revokes holds from the
next one on.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NewType

from tidegate.api.keys import new_key
from tidegate.cloud.key_rules import KeyRules, rules_from_json
from tidegate.errors import ConfigError
from tidegate.link.at_rest import Database

KeyId = NewType("KeyId", str)
FILE: Final = "api-keys.sqlite"
MOST_KEY_CHARS: Final = 256
"""Longer tokens are no key of ours, and not worth hashing."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_SCHEMA: Final = (
    (
        "CREATE TABLE api_keys (key_id TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE,"
        " name TEXT NOT NULL, created_s REAL NOT NULL, expires_s REAL, revoked_s REAL,"
        " rules TEXT NOT NULL)",
    ),
)
_COLUMNS: Final = "key_id, name, created_s, expires_s, revoked_s, rules, digest"


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """What is kept of a key; times are Unix seconds. The key itself is not."""

    id: KeyId
    name: str
    created_s: float
    expires_s: float | None
    revoked_s: float | None
    rules: KeyRules

    def refusal(self, now_s: float) -> str | None:
        """Why it opens nothing, as a code; None when it does."""
        if self.revoked_s is not None:
            return "key_revoked"
        if self.expires_s is not None and now_s >= self.expires_s:
            return "key_expired"
        return None

    def to_json(self) -> dict[str, Any]:
        """For people and scripts."""
        facts = {name: getattr(self, name) for name in ("id", "name", "created_s")}
        facts |= {"expires_s": self.expires_s, "revoked_s": self.revoked_s}
        return facts | self.rules.to_json()


class ApiKeyStore:
    """See the module. Used by one thread at a time, and by several processes.

    Raises:
        LinkError: the file is no key store, its pepper is another one, or a newer release wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self._db = Database(folder / FILE, _SCHEMA)

    def add(
        self, name: str, rules: KeyRules, *, now_s: float, expires_s: float | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns what is kept, and the key, which is not.

        Raises:
            ConfigError: the name is taken or not allowed, or it would be expired already.
            CapacityError: the file cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError("name", name, "1 to 64 letters, digits, dots, dashes, underscores")
        if expires_s is not None and expires_s <= now_s:
            raise ConfigError("expires", expires_s, "in the future")
        key, key_id = new_key(), KeyId(f"key-{secrets.token_hex(6)}")
        with self._db.write() as db:
            taken = "SELECT 1 FROM api_keys WHERE name = ? AND revoked_s IS NULL"
            if db.execute(taken, (name,)).fetchone():
                raise ConfigError("name", name, "one that no other key has, until it is revoked")
            row = (key_id, self._digest(key), name, now_s, expires_s, json.dumps(rules.to_json()))
            db.execute("INSERT INTO api_keys VALUES (?, ?, ?, ?, ?, NULL, ?)", row)
        record = ApiKey(
            id=key_id,
            name=name,
            created_s=now_s,
            expires_s=expires_s,
            revoked_s=None,
            rules=rules,
        )
        return record, key

    def revoke(self, which: str, *, now_s: float) -> ApiKey:
        """Refuse the key with this id, or name, from the next request on, for good.

        Raises:
            ConfigError: there is no such key.
            CapacityError: the file cannot be written.
        """
        with self._db.write() as db:
            changed = db.execute(
                "UPDATE api_keys SET revoked_s = ? WHERE revoked_s IS NULL"
                " AND (key_id = ? OR name = ?) RETURNING key_id",
                (now_s, which, which),
            ).fetchall()
        if not changed:
            raise ConfigError("key", which, "the id or name of a key that is not revoked")
        return self._records("WHERE key_id = ?", changed[0][0])[0]

    def keys(self) -> list[ApiKey]:
        """Every key, revoked ones too, the oldest first."""
        return self._records("ORDER BY created_s, key_id")

    def find(self, key: str) -> ApiKey | None:
        """The record of `key`, whether it may still be used or not.

        Raises:
            CapacityError: the file cannot be read.
        """
        if not 0 < len(key) <= MOST_KEY_CHARS:
            return None
        digest = self._digest(key)
        rows = self._db.read(f"SELECT {_COLUMNS} FROM api_keys WHERE digest = ?", digest)
        if not rows or not hmac.compare_digest(rows[0][-1], digest):
            return None
        return _record(rows[0])

    def named(self, name: str) -> ApiKey | None:
        """The key with this name: the one that is not revoked, else the last that was.

        Raises:
            CapacityError: the file cannot be read.
        """
        found = self._records(
            "WHERE name = ? ORDER BY revoked_s IS NOT NULL, created_s DESC LIMIT 1", name
        )
        return found[0] if found else None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _digest(self, key: str) -> bytes:
        return self._db.cipher.fingerprint("api key", key.encode("utf-8", "surrogatepass"))

    def _records(self, where: str, *values: object) -> list[ApiKey]:
        return [
            _record(row)
            for row in self._db.read(f"SELECT {_COLUMNS} FROM api_keys {where}", *values)
        ]


def _record(row: tuple[Any, ...]) -> ApiKey:
    return ApiKey(
        id=KeyId(row[0]),
        name=row[1],
        created_s=row[2],
        expires_s=row[3],
        revoked_s=row[4],
        rules=_rules(row[5]),
    )


@lru_cache(maxsize=1024)
def _rules(text: str) -> KeyRules:
    """Rules never change, and reading them takes as long as finding them."""
    return rules_from_json(json.loads(text))
