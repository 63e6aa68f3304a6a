"""TLS of an HTTP surface: certificates from files, taken up again when the files change.

The listener keeps one context for its life, whose callback hands every handshake on to the current
one. So new files never touch a connection that stands, and are used as a whole or not at all: what
cannot be loaded is logged, and the old certificate goes on serving. TLS 1.2 and later; where
clients show certificates 1.3 only, since before it they travel in the clear, and no sessions are
resumed, so that every connection is checked against the authorities of today.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidegate.api.hangup import on_hangup
from tidegate.errors import ConfigError

_log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 5.0
"""Between two looks at the files; SIGHUP looks at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """PEM files of a server."""

    certificate: Path
    """Its own first, then those that signed it."""
    key: Path
    client_ca: Path | None = None
    """Authorities of clients, who then must show a certificate; None asks for none."""

    @property
    def all(self) -> tuple[Path, ...]:
        """Those that there are."""
        return (self.certificate, self.key, *(() if self.client_ca is None else (self.client_ca,)))


class ServerTls:
    """The server's side of TLS. `context` is for the listener, `run` keeps it fresh.

    Args:
        files: what to use.
        wall_s: Unix seconds.

    Raises:
        ConfigError: a file is missing, unreadable or none, the key is another certificate's or
            has a passphrase, or the certificate is not valid now.
    """

    def __init__(self, files: TlsFiles, *, wall_s: Callable[[], float] = time.time) -> None:
        self._files, self._wall_s = files, wall_s
        self._seen = _fingerprint(files)
        self._refused: tuple[tuple[object, ...], str] | None = None
        """The files that were refused last, and why."""
        self._current, self.expires_s = _load(files, wall_s())
        self.context = _fresh(files)
        self.context.sni_callback = self._hand_on

    @property
    def mutual(self) -> bool:
        """Clients have to show a certificate."""
        return self._files.client_ca is not None

    def reload(self) -> bool:
        """Use the files if they changed; True if so.

        Files that are refused are tried again each time, since some reasons pass by themselves: a
        clock that is behind the certificate, or no descriptor left to open a file with.

        Raises:
            ConfigError: as the constructor, once for the same files and reason; what was used
                before goes on being used.
        """
        seen = _fingerprint(self._files)
        if seen == self._seen:
            self._refused = None
            return False
        try:
            self._current, self.expires_s = _load(self._files, self._wall_s())
        except ConfigError as error:
            refused = (seen, str(error))
            if refused == self._refused:
                return False
            self._refused = refused
            raise
        self._seen, self._refused = seen, None
        return True

    async def run(self) -> None:
        """Look at the files now and then, and on SIGHUP. Ends by cancellation."""
        hangup = asyncio.Event()
        with on_hangup(hangup.set):
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await hangup.wait()
                hangup.clear()
                try:
                    if await asyncio.to_thread(self.reload):
                        _log.info("TLS: the certificate was loaded again")
                except ConfigError as error:
                    _log.error("TLS: the old certificate stays in use: %s", error)

    def _hand_on(
        self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext
    ) -> None:
        connection.context = self._current


CLIENT_NAME: Final = "tidegate.client_name"
"""Where a request's `scope["state"]` has the name of the certificate that its client showed."""


def client_name(certificate: Mapping[str, Any] | None) -> str | None:
    """The common name of a client's verified certificate, as `SSLObject.getpeercert` tells it."""
    for part in (certificate or {}).get("subject", ()):
        for field, value in part:
            if field == "commonName":
                return str(value)
    return None


def _fresh(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if files.client_ca is not None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(files: TlsFiles, now_s: float) -> tuple[ssl.SSLContext, float]:
    """A context with the files in it, and when the certificate ends."""
    context = _fresh(files)
    _check_readable("tls-cert", files.certificate)
    _check_readable("tls-key", files.key)
    expires_s = _check_valid(files.certificate, now_s)
    try:
        # Without a password given OpenSSL would ask for one on the terminal.
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        allowed = f"the PEM key of {files.certificate}, without a passphrase"
        raise ConfigError("tls-key", str(files.key), allowed) from error
    if files.client_ca is not None:
        _check_readable("tls-client-ca", files.client_ca)
        try:
            context.load_verify_locations(cafile=files.client_ca)
        except (OSError, ssl.SSLError) as error:
            allowed = "a file of PEM certificates"
            raise ConfigError("tls-client-ca", str(files.client_ca), allowed) from error
    _warn_of_readers(files.key)  # last, as files that are refused are tried again and again
    return context, expires_s


def _warn_of_readers(key: Path) -> None:
    # Gone again already: the next look sees it.
    with suppress(OSError):
        if key.stat().st_mode & 0o077:
            _log.warning("TLS: %s can be read by others than its owner", key)


def _check_readable(setting: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        why = (error.strerror or "unreadable").lower()
        raise ConfigError(setting, str(path), f"a file that can be read: {why}") from None


def _check_valid(path: Path, now_s: float) -> float:
    """When the certificate ends, in Unix seconds."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except (ValueError, TypeError, OSError, x509.InvalidVersion):
        raise ConfigError("tls-cert", str(path), "a PEM certificate") from None
    if not begins.timestamp() <= now_s < ends.timestamp():
        allowed = f"valid now, not only from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC"
        raise ConfigError("tls-cert", str(path), allowed)
    return ends.timestamp()


def _no_password() -> str:
    return ""


def _fingerprint(files: TlsFiles) -> tuple[object, ...]:
    """Changes when a file does; mounted secrets are links that are turned elsewhere."""
    found: list[object] = []
    for path in files.all:
        try:
            facts = path.stat()
            found.append((facts.st_ino, facts.st_size, facts.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)
