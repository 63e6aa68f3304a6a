"""TLS of a gateway's HTTP server: the fleet's authority names it, and may ask devices for theirs.

`http-cert.pem` and `http-key.pem` in the gateway's folder are used as they are. A gateway that has
the authority can make them itself, for the names that devices call it by. TLS 1.3 only, as for the
broker: a client certificate names a handle, and older versions send it in the clear.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tidegate.errors import ConfigError
from tidegate.link.certificate_facts import renewal_due_s
from tidegate.link.certificates import issue_server
from tidegate.link.certificates_store import BROKER_CA, CA_CERTIFICATE, load_authority
from tidegate.link.keyfiles import read_public, write_atomic

HTTP_CERTIFICATE = "http-cert.pem"
HTTP_KEY = "http-key.pem"


class HttpTls:
    """The server's side of TLS, from a gateway's folder.

    Args:
        folder: of the gateway's keys.
        names: that devices call it by; its authority then makes a certificate for them.
        clients: ask every client for a certificate of the fleet.
        wall_s: Unix seconds.

    Raises:
        ConfigError: a file is missing or cannot be used, or a name is none.
        IdentityError: `names` were given and the folder has no authority.
    """

    def __init__(
        self,
        folder: Path,
        *,
        names: Sequence[str] = (),
        clients: bool = False,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._names, self._wall_s = folder, tuple(names), wall_s
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.set_alpn_protocols(["http/1.1"])
        if clients:
            self._ask_clients()
        if names:
            self._make()
        self._load()

    def renew(self) -> bool:
        """Make a new certificate if it is due and we make them; True if so.

        Raises:
            ConfigError, IdentityError: as the constructor; the old one stays in use.
        """
        certificate = read_public(self._folder / HTTP_CERTIFICATE)
        if not self._names or self._wall_s() < renewal_due_s(certificate):
            return False
        self._make()
        self._load()
        return True

    def _make(self) -> None:
        made = issue_server(load_authority(self._folder).current, self._names, now_s=self._wall_s())
        write_atomic(self._folder / HTTP_KEY, made.key_pem)
        write_atomic(self._folder / HTTP_CERTIFICATE, made.certificate_pem)

    def _load(self) -> None:
        certificate, key = self._folder / HTTP_CERTIFICATE, self._folder / HTTP_KEY
        try:
            # An encrypted key would make OpenSSL ask on the terminal.
            self.context.load_cert_chain(certificate, key, password=lambda: "")
        except (OSError, ssl.SSLError, ValueError) as error:
            allowed = f"a PEM certificate whose key is {key}; or name the gateway's host"
            raise ConfigError("link.http.certificate", str(certificate), allowed) from error

    def _ask_clients(self) -> None:
        # A gateway that connects to a broker has the first, one that enrols has the second.
        known = [self._folder / name for name in (BROKER_CA, CA_CERTIFICATE)]
        roots = next((path for path in known if path.exists()), known[0])
        try:
            self.context.load_verify_locations(cafile=roots)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                "link.http.client_certificates", str(roots), "a file of the fleet's authorities"
            ) from error
        self.context.verify_mode = ssl.CERT_REQUIRED


def has_certificate(folder: Path) -> bool:
    """A certificate for HTTP lies in a gateway's folder."""
    return (folder / HTTP_CERTIFICATE).exists()
