"""Certificates as files, for tests of TLS: an authority, servers and clients, on any days."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tidegate.api.tls import TlsFiles

_HERE = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


@dataclass(frozen=True, kw_only=True)
class Authority:
    """Signs certificates, and writes everything into one folder."""

    folder: Path
    name: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, folder: Path, name: str = "ca") -> Authority:
        """A new one, written to `NAME.pem`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(f"Test authority {name}")
        made = (
            _builder(subject, subject, key.public_key(), days=(-1, 30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_AUTHORITY_USAGE, critical=True)
            .sign(key, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        return cls(folder=folder, name=name, certificate=made, key=key)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pem"

    def certify(
        self,
        common_name: str,
        *,
        days: tuple[float, float] = (-1, 30),
        passphrase: bytes | None = None,
        to: str | None = None,
    ) -> TlsFiles:
        """A certificate for this machine and its key, as `TO-cert.pem` and `TO-key.pem`."""
        key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        made = (
            _builder(_subject(common_name), self.certificate.subject, key.public_key(), days=days)
            .add_extension(x509.SubjectAlternativeName(_HERE), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(identifier, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            encryption = serialization.BestAvailableEncryption(passphrase)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
        files = TlsFiles(
            certificate=self.folder / f"{to or common_name}-cert.pem",
            key=self.folder / f"{to or common_name}-key.pem",
        )
        files.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        files.key.touch(mode=0o600)
        files.key.write_bytes(pem)
        return files

    def trusting(self, client: TlsFiles | None = None) -> ssl.SSLContext:
        """A client's context that believes it, and shows the client's certificate."""
        context = ssl.create_default_context(cafile=self.path)
        if client is not None:
            context.load_cert_chain(client.certificate, client.key)
        return context


_AUTHORITY_USAGE = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    days: tuple[float, float],
) -> x509.CertificateBuilder:
    begins, ends = (datetime.now(UTC) + timedelta(days=day) for day in days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
