"""Reading X.509 certificates: whom they name, how long they last, whether one of ours signed them.

PEM bytes in, plain values out; nobody outside `certificates` and this module sees a `cryptography`
certificate object.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID

from tidegate.errors import IdentityError

DAMAGED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.InvalidVersion,
    CryptographyDeprecationWarning,
)
"""What the library raises of bytes that are no certificate; the last where warnings are errors."""
"""All that `cryptography` raises over X.509 from strangers; not all of it is a `ValueError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateFacts:
    """What a certificate says; times are Unix seconds."""

    common_name: str
    serial: int
    nbf_s: int
    naf_s: int
    fingerprint: str
    """SHA-256 of the DER form, hexadecimal."""


def read_facts(certificate_pem: bytes) -> CertificateFacts:
    """Read the first certificate of `certificate_pem`; nothing about it is verified.

    Raises:
        IdentityError: it is damaged or has no common name.
    """
    certificate = load_certificate(certificate_pem)
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        nbf, naf = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        der = certificate.public_bytes(serialization.Encoding.DER)
    except DAMAGED:
        # A certificate is parsed as far as it is looked at.
        raise IdentityError("certificate: is damaged") from None
    if len(names) != 1:
        raise IdentityError("certificate: must have one common name")
    return CertificateFacts(
        common_name=str(names[0].value),
        serial=certificate.serial_number,
        nbf_s=int(nbf.timestamp()),
        naf_s=int(naf.timestamp()),
        fingerprint=hashlib.sha256(der).hexdigest(),
    )


def common_name(certificate_pem: bytes) -> str:
    """The handle of a device's certificate, `gw-<name>` of a gateway's.

    Raises:
        IdentityError: as `read_facts`.
    """
    return read_facts(certificate_pem).common_name


def expires_s(certificate_pem: bytes) -> int:
    """When it ends, in Unix seconds.

    Raises:
        IdentityError: as `read_facts`.
    """
    return read_facts(certificate_pem).naf_s


def renewal_due_s(certificate_pem: bytes) -> float:
    """When two thirds of its life are over, in Unix seconds.

    Raises:
        IdentityError: as `read_facts`.
    """
    facts = read_facts(certificate_pem)
    return facts.nbf_s + (facts.naf_s - facts.nbf_s) * 2 / 3


def check_issued(certificate_pem: bytes, ca_bundle_pem: bytes, key_pem: bytes | None) -> None:
    """Check that an authority of the bundle signed the certificate, and that the key is its own.

    Raises:
        IdentityError: it did not, or it is not; or one of them is damaged.
    """
    certificate = load_certificate(certificate_pem)
    if key_pem is not None and load_private_key(key_pem).public_key() != certificate.public_key():
        raise IdentityError("certificate: is of another key than ours")
    for authority in load_certificates(ca_bundle_pem):
        try:
            certificate.verify_directly_issued_by(authority)
        except DAMAGED:
            continue
        return
    raise IdentityError("certificate: not signed by the fleet's certificate authority")


def split_bundle(bundle_pem: bytes) -> list[bytes]:
    """The certificates of a bundle, each as PEM.

    Raises:
        IdentityError: one is damaged, or there is none.
    """
    return [one.public_bytes(serialization.Encoding.PEM) for one in load_certificates(bundle_pem)]


def load_certificates(bundle_pem: bytes) -> list[x509.Certificate]:
    """The certificates of a bundle.

    Raises:
        IdentityError: one is damaged, or there is none.
    """
    try:
        found = x509.load_pem_x509_certificates(bundle_pem)
    except DAMAGED:
        raise IdentityError("certificate: cannot be read as PEM") from None
    if any(one.serial_number <= 0 for one in found):
        raise IdentityError("certificate: its serial number must be positive (RFC 5280)")
    return found


def load_certificate(certificate_pem: bytes) -> x509.Certificate:
    """The first of a bundle.

    Raises:
        IdentityError: as `load_certificates`.
    """
    return load_certificates(certificate_pem)[0]


def load_private_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    """A P-256 key.

    Raises:
        IdentityError: it is damaged, encrypted or of another kind.
    """
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except DAMAGED:
        raise IdentityError("certificate key: cannot be read as PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError("certificate key: must be ECDSA P-256")
    return key
