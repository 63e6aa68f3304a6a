"""One-time tokens in the gateway's registry: what is kept of them, and the one use they have.

The secret is kept as a digest only. Using a token, and everything that follows from it, is one
transaction, so of several devices with one token exactly one gets in, whatever process each is
served by; that one may repeat its very request and gets the same answer.
"""

from __future__ import annotations

import hmac
import secrets
import sqlite3
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tidegate.errors import CapacityError, IdentityError, SealError
from tidegate.link.clock import describe_s
from tidegate.link.enrolment import (
    SECRET_BYTES,
    TOKEN_VALID_S,
    OpenedRequest,
    Token,
    open_request,
    secret_digest,
    token_id_of,
)
from tidegate.link.registry import DeviceRegistry

MOST_FAILURES = 10
"""Wrong requests for one token, after which it is spent."""
REFUSED = "enrolment: refused: unknown token, or a damaged request"
_MOST_REMEMBERED = 4096
_KEPT_AFTER_S = 7 * 24 * 3600
"""An expired token is known for this long, so that its holder is told why."""

Grant = Callable[[sqlite3.Connection, OpenedRequest], bytes]
"""Registers the device in the transaction that uses up the token; returns the answer."""


class AttemptLimit:
    """At most so many failed attempts of one source in any minute, over all tokens.

    By source, so that a stranger's junk does not keep devices out. It spares the machine; what
    keeps strangers out is the token's 128 bits.
    """

    def __init__(self, most: int = 30, within_s: float = 60.0) -> None:
        self._most, self._within_s = most, within_s
        self._failed: deque[tuple[float, str]] = deque(maxlen=_MOST_REMEMBERED)

    def check(self, now_s: float, source: str = "") -> None:
        """Raise `CapacityError` when there were too many."""
        while self._failed and not now_s - self._within_s < self._failed[0][0] <= now_s:
            self._failed.popleft()
        own = [at_s for at_s, who in self._failed if who == source]
        if len(own) >= self._most:
            raise CapacityError(
                "enrolment: too many failed attempts; wait a minute",
                retry_after_s=own[0] + self._within_s - now_s,
            )

    def failed(self, now_s: float, source: str = "") -> None:
        self._failed.append((now_s, source))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    digest: bytes = field(repr=False)
    private: bytes = field(repr=False)
    expires_s: int
    failures: int
    used_by: bytes | None = field(repr=False)
    answer: bytes | None = field(repr=False)


class TokenTable:
    """See the module."""

    def __init__(self, registry: DeviceRegistry, *, limit: AttemptLimit | None = None) -> None:
        self._registry = registry
        self._limit = limit or AttemptLimit()
        # Stands in for a token there is not, so that asking for one takes as long.
        self._nobody = _Row(
            digest=secrets.token_bytes(32),
            private=X25519PrivateKey.generate().private_bytes_raw(),
            expires_s=0,
            failures=0,
            used_by=None,
            answer=None,
        )

    def make(
        self,
        *,
        root: bytes,
        group: str,
        url: str,
        now_s: float,
        valid_s: float = TOKEN_VALID_S,
    ) -> Token:
        """Make a token; this is the only time that anybody sees it.

        Raises:
            CapacityError: the registry cannot be written.
        """
        private = X25519PrivateKey.generate()
        token = Token(
            root=root,
            box=private.public_key().public_bytes_raw(),
            secret=secrets.token_bytes(SECRET_BYTES),
            group=group,
            url=url,
        )
        kept = (
            token.token_id,
            secret_digest(token.secret),
            private.private_bytes_raw(),
            int(now_s + valid_s),
        )
        with self._registry.transaction() as db:
            db.execute("DELETE FROM tokens WHERE expires_s < ?", (int(now_s) - _KEPT_AFTER_S,))
            db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, 0, NULL, NULL)", kept)
        return token

    def use(self, request: bytes, grant: Grant, *, now_s: float, source: str = "") -> bytes:
        """Answer an enrolment request, using its token up.

        Raises:
            IdentityError: there is no such token, or it is used, expired or spent.
            CapacityError: too many attempts failed lately, or the registry cannot be written.
        """
        self._limit.check(now_s, source)
        try:
            token_id = token_id_of(request)
        except SealError:
            self._limit.failed(now_s, source)
            raise IdentityError(REFUSED) from None
        with self._registry.transaction() as db:
            row = _find(db, token_id)
            answer, problem = self._decide(db, row, request, grant, now_s)
            if answer is not None:
                # The key that opens the request goes with its use.
                db.execute(
                    "UPDATE tokens SET used_by = ?, answer = ?, private_key = x''"
                    " WHERE token_id = ?",
                    (_digest(request), answer, token_id),
                )
                return answer
            db.execute("UPDATE tokens SET failures = failures + 1 WHERE token_id = ?", (token_id,))
        self._limit.failed(now_s, source)
        raise IdentityError(problem)

    def _decide(
        self,
        db: sqlite3.Connection,
        row: _Row | None,
        request: bytes,
        grant: Grant,
        now_s: float,
    ) -> tuple[bytes | None, str]:
        """The answer, or why there is none; only a token's holder learns why."""
        if row is not None and row.used_by is not None:
            if hmac.compare_digest(row.used_by, _digest(request)):
                return row.answer, ""
            return None, "token: was used already; make another one"
        opened = _open(row or self._nobody, request)
        if opened is None or row is None:
            return None, REFUSED
        if row.failures >= MOST_FAILURES:
            return None, f"token: spent by {row.failures} failed attempts; make another one"
        if now_s >= row.expires_s:
            since = describe_s(now_s - row.expires_s)
            return None, f"token: expired {since} ago; make another one"
        return grant(db, opened), ""


def _find(db: sqlite3.Connection, token_id: bytes) -> _Row | None:
    row = db.execute(
        "SELECT secret_digest, private_key, expires_s, failures, used_by, answer FROM tokens"
        " WHERE token_id = ?",
        (token_id,),
    ).fetchone()
    if row is None:
        return None
    return _Row(
        digest=row[0],
        private=row[1],
        expires_s=row[2],
        failures=row[3],
        used_by=row[4],
        answer=row[5],
    )


def _open(row: _Row, request: bytes) -> OpenedRequest | None:
    """None when it does not open or its secret is wrong; compared in constant time."""
    try:
        opened = open_request(request, X25519PrivateKey.from_private_bytes(row.private))
    except SealError:
        return None
    return opened if hmac.compare_digest(secret_digest(opened.secret), row.digest) else None


def _digest(request: bytes) -> bytes:
    return secret_digest(request)
