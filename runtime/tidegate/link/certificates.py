"""X.509 for the broker: the fleet's certificate authority, and what it signs.

The sealed link does not need these certificates: they only tell the broker whose topics a
connection may use, so the subject is the opaque handle and nothing else. ECDSA P-256 throughout,
which mosquitto (OpenSSL) and AWS IoT both take; Ed25519 they do not. Keys and certificates are PEM
bytes; a bundle is several of them one after another.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tidegate.errors import ConfigError, IdentityError
from tidegate.link.certificate_facts import DAMAGED, load_certificate, load_private_key
from tidegate.link.topics import check_name

CA_DAYS = 3650
SERVER_DAYS = 365
DEVICE_DAYS = 60
"""Within the 30 to 90 days of LINK.md; renewed at two thirds of it."""
GATEWAY_DAYS = 90
BACKDATED_S = 3600
"""A certificate starts this much before it is made: a peer's clock may be 10 minutes behind, and
TLS libraries tolerate nothing themselves."""
GATEWAY_PREFIX = "gw-"
"""A gateway's common name is `gw-<name>`; handles are hexadecimal, so the two never meet."""

_HOST = re.compile(r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.?)+")
_SERVER_NAME = "broker"
_COMMON_NAME_CHARACTERS = 64
"""ub-common-name, RFC 5280 appendix A.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CertifiedKey:
    """A certificate and its private key, both PEM; the key is PKCS #8 and not encrypted."""

    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


def make_ca(fleet_name: str, days: int = CA_DAYS, *, now_s: float | None = None) -> CertifiedKey:
    """Make a certificate authority that signs itself and may sign no other authority.

    Raises:
        ConfigError: `fleet_name` is no name, or `days` is out of range.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    # The key's id in the name tells two authorities of one fleet apart while they overlap.
    public = key.public_key()
    mark = x509.SubjectKeyIdentifier.from_public_key(public).digest.hex()[:8]
    name = _name(f"tidegate {check_name('fleet', fleet_name)[:40]} {mark}")
    builder = _builder(name, name, public, days, now_s)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    return _certified(builder.sign(key, hashes.SHA256()), key)


def issue_server(
    ca: CertifiedKey,
    names_and_ips: Sequence[str],
    days: int = SERVER_DAYS,
    *,
    now_s: float | None = None,
) -> CertifiedKey:
    """Make the broker's own key and certificate for the host names and addresses it has.

    Raises:
        ConfigError: no name was given, or one is neither a host name nor an address.
        IdentityError: `ca` cannot be read.
    """
    if not names_and_ips:
        raise ConfigError("server names", "", "at least one host name or address")
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([_general_name(name) for name in names_and_ips])
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    certificate = _issue(
        ca, _SERVER_NAME, key.public_key(), usage, days, now_s, alternative_names=names
    )
    return _certified(certificate, key)


def issue_gateway(
    ca: CertifiedKey,
    gateway_id: str,
    days: int = GATEWAY_DAYS,
    *,
    now_s: float | None = None,
) -> CertifiedKey:
    """Make the key and certificate with which a gateway connects to the broker.

    Raises:
        ConfigError: `gateway_id` is no name, or `days` is out of range.
        IdentityError: `ca` cannot be read.
    """
    key_pem = _key_pem(ec.generate_private_key(ec.SECP256R1()))
    pem = reissue_gateway(ca, key_pem, gateway_id, days, now_s=now_s)
    return CertifiedKey(certificate_pem=pem, key_pem=key_pem)


def reissue_gateway(
    ca: CertifiedKey,
    key_pem: bytes,
    gateway_id: str,
    days: int = GATEWAY_DAYS,
    *,
    now_s: float | None = None,
) -> bytes:
    """A new certificate for the key that a gateway has, PEM.

    Raises:
        ConfigError, IdentityError: as `issue_gateway`; or the key cannot be read.
    """
    name, public = gateway_common_name(gateway_id), load_private_key(key_pem).public_key()
    certificate = _issue(ca, name, public, ExtendedKeyUsageOID.CLIENT_AUTH, days, now_s)
    return certificate.public_bytes(serialization.Encoding.PEM)


def gateway_common_name(gateway_id: str) -> str:
    """`gw-<name>`, at most the 64 characters that a common name may have.

    Raises:
        ConfigError: it is no name, or too long.
    """
    name = GATEWAY_PREFIX + check_name("gateway", gateway_id)
    if len(name) > _COMMON_NAME_CHARACTERS:
        most = _COMMON_NAME_CHARACTERS - len(GATEWAY_PREFIX)
        raise ConfigError("gateway", gateway_id, f"at most {most} characters")
    return name


def make_request(handle: str | None = None) -> tuple[bytes, bytes]:
    """Make a device's TLS key and a request to certify it, both PEM: `(csr, key)`.

    Whoever issues the certificate decides the name in it, so a device that has no handle yet
    leaves it out.

    Raises:
        ConfigError: `handle` is no handle.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([]) if handle is None else _name(check_name("handle", handle))
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def issue_device(
    ca: CertifiedKey,
    csr_pem: bytes,
    handle: str,
    days: int = DEVICE_DAYS,
    *,
    now_s: float | None = None,
) -> bytes:
    """Certify the key of `csr_pem` for `handle`; whatever else the request asks for is ignored.

    Returns:
        The certificate, PEM.

    Raises:
        IdentityError: the request is damaged, its signature does not fit, or its key is not P-256.
        ConfigError: `handle` is no handle, looks like a gateway, or `days` is out of range.
    """
    check_name("handle", handle)
    if handle.startswith(GATEWAY_PREFIX):
        raise ConfigError("handle", handle, f"without {GATEWAY_PREFIX!r} in front")
    public = _requested_key(csr_pem)
    certificate = _issue(ca, handle, public, ExtendedKeyUsageOID.CLIENT_AUTH, days, now_s)
    return certificate.public_bytes(serialization.Encoding.PEM)


def check_request(csr_pem: bytes) -> None:
    """Check a certificate request as `issue_device` would, before anything is decided.

    Raises:
        IdentityError: it is damaged, its signature does not fit, or its key is not P-256.
    """
    _requested_key(csr_pem)


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public = request.public_key()
        sound = request.is_signature_valid
    except DAMAGED:
        raise IdentityError("certificate request: cannot be read") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise IdentityError("certificate request: its key must be ECDSA P-256")
    if not sound:
        raise IdentityError("certificate request: its signature does not fit its key")
    return public


def revocation_list(
    ca: CertifiedKey,
    serials: Iterable[int],
    *,
    days: int = CA_DAYS,
    now_s: float | None = None,
) -> bytes:
    """The list of revoked serial numbers for the broker's `crlfile`, PEM.

    It is valid for long: OpenSSL refuses every client once the list has expired, and the broker
    reads it from its own disk, where an old one cannot be slipped in by freshness anyway.

    Raises:
        IdentityError: `ca` cannot be read.
    """
    start = _time(now_s)
    authority = load_certificate(ca.certificate_pem)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(start - timedelta(seconds=BACKDATED_S))
        .next_update(start + timedelta(days=_check_days(days)))
        .add_extension(x509.CRLNumber(int(start.timestamp() * 1000)), critical=False)
        .add_extension(_authority_identifier(authority), critical=False)
    )
    for serial in sorted(set(serials)):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start)
        builder = builder.add_revoked_certificate(entry.build())
    signed = builder.sign(load_private_key(ca.key_pem), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def _issue(
    ca: CertifiedKey,
    common_name: str,
    public: ec.EllipticCurvePublicKey,
    usage: x509.ObjectIdentifier,
    days: int,
    now_s: float | None,
    *,
    alternative_names: x509.SubjectAlternativeName | None = None,
) -> x509.Certificate:
    authority = load_certificate(ca.certificate_pem)
    builder = _builder(_name(common_name), authority.subject, public, days, now_s)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    builder = builder.add_extension(_authority_identifier(authority), critical=False)
    if alternative_names is not None:
        builder = builder.add_extension(alternative_names, critical=False)
    return builder.sign(load_private_key(ca.key_pem), hashes.SHA256())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    now_s: float | None,
) -> x509.CertificateBuilder:
    start = _time(now_s)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - timedelta(seconds=BACKDATED_S))
        .not_valid_after(start + timedelta(days=_check_days(days)))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name):
            raise ConfigError("server name", name, "a host name or an IP address") from None
        return x509.DNSName(name)


def _check_days(days: int) -> int:
    if not 1 <= days <= CA_DAYS:
        raise ConfigError("days", days, f"1 to {CA_DAYS}")
    return days


def _time(now_s: float | None) -> datetime:
    return datetime.fromtimestamp(time.time() if now_s is None else now_s, UTC)


def _certified(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> CertifiedKey:
    return CertifiedKey(
        certificate_pem=certificate.public_bytes(serialization.Encoding.PEM), key_pem=_key_pem(key)
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
