"""TLS towards a broker: whose roots we believe, which certificate we show, what went wrong.

A client certificate names the device's handle, and TLS before 1.3 sends it in the clear, so with
one nothing older is spoken.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.errors import ConfigError
from tidegate.link.certificates_store import BROKER_CA, BROKER_CERTIFICATE, BROKER_KEY

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """PEM files for a connection; what is None is the system's roots, or no client certificate."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path) -> TlsFiles:
        """What a folder of keys has of them.

        Raises:
            ConfigError: it has a certificate or its key, but not both.
        """
        ca, certificate, key = (
            folder / name for name in (BROKER_CA, BROKER_CERTIFICATE, BROKER_KEY)
        )
        if certificate.exists() != key.exists():
            missing = key if certificate.exists() else certificate
            raise ConfigError("keys", str(missing), "there: a certificate and its key go together")
        if not certificate.exists():
            return cls(ca=ca if ca.exists() else None)
        return cls(ca=ca if ca.exists() else None, certificate=certificate, key=key)


class BrokerSocket(ssl.SSLSocket):
    """An SSL socket that closes itself when its handshake fails and remembers what it was told.

    paho forgets a socket whose handshake failed, and it drops the alert with which a TLS 1.3 peer
    refuses a client certificate: that comes after the handshake, with the first read. Who writes
    before that may find the connection closed; what was said before it closed is read then.
    """

    failure: str | None = None

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.failure = describe_ssl(error)
            raise

    def send(self, data: Buffer, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:
            with suppress(OSError):
                self.recv()
            raise


def describe_ssl(error: ssl.SSLError) -> str:
    """The alert or the failed check, in lower case: `certificate revoked`, `unknown ca`.

    A certificate that we refuse comes with why.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused: {error.verify_message.lower()}"
    reason = (error.reason or type(error).__name__).lower().replace("_", " ")
    return reason.partition("alert ")[2] or reason


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """A client's context.

    Raises:
        ConfigError: a file is missing, is none of PEM, or the key is not the certificate's.
    """
    try:
        context = ssl.create_default_context(cafile=files.ca)
    except (OSError, ssl.SSLError) as error:
        allowed = "a file of PEM certificates"
        raise ConfigError("broker.ca_file", str(files.ca), allowed) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = BrokerSocket
    if files.certificate is not None:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            # An encrypted key would make OpenSSL ask on the terminal.
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as error:
            allowed = f"a PEM certificate whose key is {files.key}"
            raise ConfigError("broker.certificate", str(files.certificate), allowed) from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")
