"""The gateway's side of enrolment and renewal: decides, signs, and writes it down first.

`Enrolment` works beside a running gateway on the same folder, in the same process or another: both
look at the registry for every message.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tidegate.errors import IdentityError
from tidegate.link.certificate_facts import read_facts, renewal_due_s
from tidegate.link.certificates import DEVICE_DAYS, issue_device, reissue_gateway
from tidegate.link.certificates_store import (
    BROKER_CERTIFICATE,
    BROKER_KEY,
    check_facts,
    load_authority,
    write_revocations,
)
from tidegate.link.enrolment import (
    TOKEN_VALID_S,
    Granted,
    OpenedRequest,
    Token,
    seal_answer,
)
from tidegate.link.envelope import DeviceId
from tidegate.link.identity import HANDLE_CHARACTERS, load_gateway, open_certificate, read_root
from tidegate.link.keyfiles import (
    passphrase_from_environment,
    read_public,
    read_secret,
    write_atomic,
)
from tidegate.link.registry import (
    DeviceRecord,
    DeviceRegistry,
    IssuedCertificate,
    insert_certificate,
    insert_device,
)
from tidegate.link.registry_tokens import AttemptLimit, TokenTable
from tidegate.link.wrapping import PassphraseSource


class Enrolment:
    """Enrols devices at the gateway whose keys are in `folder`, and renews what they have.

    Args:
        folder: a gateway's, with a certificate authority.
        days: how long a device's certificate lasts, 30 to 90.
        wall_s: the clock, Unix seconds.
        passphrase: asked when a key is wrapped.
        limit: on failed attempts.

    Raises:
        IdentityError: the folder has no authority, or a key cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        days: int = DEVICE_DAYS,
        wall_s: Callable[[], float] = time.time,
        passphrase: PassphraseSource = passphrase_from_environment,
        limit: AttemptLimit | None = None,
    ) -> None:
        self._identity = load_gateway(folder, passphrase=passphrase)
        self._authority = load_authority(folder, passphrase=passphrase)
        self._root = read_root(folder)
        # A folder whose parts come from different fleets would make tokens that no device takes.
        root = Ed25519PublicKey.from_public_bytes(self._root)
        check_facts(root, self._authority.facts, self._identity.group, self._authority.bundle_pem)
        open_certificate(root, self._identity.certificate)
        self._folder, self._days, self._wall_s = folder, days, wall_s
        self.registry = DeviceRegistry(folder / "devices.sqlite")
        self._tokens = TokenTable(self.registry, limit=limit)

    def close(self) -> None:
        self.registry.close()

    def make_token(self, url: str = "", *, valid_s: float = TOKEN_VALID_S) -> Token:
        """A token for one device, which finds the endpoint at `url`.

        Raises:
            CapacityError: the registry cannot be written.
        """
        return self._tokens.make(
            root=self._root,
            group=self._identity.group,
            url=url,
            now_s=self._wall_s(),
            valid_s=valid_s,
        )

    def enrol(self, request: bytes, *, source: str = "") -> bytes:
        """Answer a device's request; the same request again has the same answer.

        `source` is where it came from: one that fails too often is turned away for a while.

        Raises:
            IdentityError: its token is unknown, used, expired or spent, or its certificate
                request is not sound.
            CapacityError: too many attempts failed lately, or the registry cannot be written.
        """
        return self._tokens.use(request, self._grant, now_s=self._wall_s(), source=source)

    def _grant(self, db: sqlite3.Connection, request: OpenedRequest) -> bytes:
        now_s = self._wall_s()
        device_id = DeviceId(secrets.token_bytes(16))
        handle = secrets.token_hex(HANDLE_CHARACTERS // 2)
        issued = self._issue(request.csr_pem, handle, request.digest)
        record = DeviceRecord(
            device_id=device_id,
            handle=handle,
            public_key=request.public_key,
            revoked=False,
            enrolled_s=int(now_s),
            expires_s=issued.expires_s,
        )
        insert_device(db, record)
        insert_certificate(db, device_id, issued)
        granted = self._granted(record, issued.pem)
        return seal_answer(self._identity, request, granted, now_s=now_s)

    def renew(self, device_id: DeviceId, csr_pem: bytes) -> Granted:
        """A new certificate for a device that the link has just recognised by its key.

        Raises:
            IdentityError: it is unknown, revoked or expired, has renewed too often, or its
                request is not sound.
            CapacityError: the registry cannot be used.
        """
        record = self.registry.find(device_id)
        refusal = "unknown" if record is None else record.refusal(self._wall_s())
        if record is None or refusal is not None:
            raise IdentityError(f"renewal: this device is refused: {refusal}")
        digest = hashlib.sha256(csr_pem).digest()
        pem = self.registry.certificate_for(device_id, digest)
        if pem is None:
            issued = self._issue(csr_pem, record.handle, digest)
            self.registry.renewed(device_id, issued, now_s=self._wall_s())
            pem = issued.pem
        return self._granted(record, pem)

    def renew_own(self) -> bool:
        """Renew the gateway's own broker certificate if it has one and it is due; True if so.

        The key stays: two files cannot be replaced at once, and a connection reads both.
        """
        path = self._folder / BROKER_CERTIFICATE
        if not path.exists() or self._wall_s() < renewal_due_s(read_public(path)):
            return False
        pem = reissue_gateway(
            self._authority.current,
            read_secret(self._folder / BROKER_KEY),
            self._identity.gateway_id,
            now_s=self._wall_s(),
        )
        write_atomic(path, pem)
        return True

    def revoke(self, handle: str) -> int:
        """Refuse a device from its next message on, and tell the broker by `revoked.pem`.

        Returns:
            How many certificates the list now revokes.

        Raises:
            IdentityError: no device has this handle.
            CapacityError: the registry cannot be written.
        """
        record = self.registry.find_handle(handle)
        if record is None:
            raise IdentityError(f"handle {handle}: no device here has it")
        self.registry.revoke(record.device_id)
        return self.write_revocations()

    def write_revocations(self) -> int:
        """Write `revoked.pem` as the registry has it; returns how many it revokes."""
        return write_revocations(self._folder, self._authority, self.registry, now_s=self._wall_s())

    def _issue(self, csr_pem: bytes, handle: str, digest: bytes) -> IssuedCertificate:
        pem = issue_device(
            self._authority.current, csr_pem, handle, self._days, now_s=self._wall_s()
        )
        facts = read_facts(pem)
        return IssuedCertificate(
            serial=facts.serial, expires_s=facts.naf_s, request_digest=digest, pem=pem
        )

    def _granted(self, record: DeviceRecord, certificate_pem: bytes) -> Granted:
        return Granted(
            group=self._identity.group,
            gateway_id=self._identity.gateway_id,
            device_id=record.device_id,
            handle=record.handle,
            certificate_pem=certificate_pem,
            authorities_pem=self._authority.bundle_pem,
            facts=self._authority.facts,
        )
