"""Enrolment, sans-I/O: the token, the device's sealed request, the gateway's sealed answer.

A token goes to the device by a trusted way and says whom to believe; after that any way will do,
HTTP or files, since both messages are sealed. Big-endian::

    token    root[32] | box[32] | secret[16] | group_bytes u8 | group | url      base64url, checksum
    request  "TGE1" | token_id[16] | HPKE(box, secret | device key[32] | statement of device key)
    answer   HPKE(answer key, certificate_bytes u16 | certificate | statement of gateway key)

`box` is an X25519 key that the gateway made for this token and erases with its use. The statement
in the request proves that the device has the key that it names; the answer's statement names the
request's digest, so it fits no other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from tidegate.errors import IdentityError, SealError
from tidegate.link import statements
from tidegate.link.certificate_facts import check_issued, read_facts
from tidegate.link.certificates_store import check_facts
from tidegate.link.clock import check_clock, check_period
from tidegate.link.envelope import DeviceId
from tidegate.link.identity import GatewayIdentity, open_certificate
from tidegate.link.topics import check_name

TOKEN_VALID_S = 24 * 3600
SECRET_BYTES = 16
MOST_MESSAGE_BYTES = 64 * 1024
_PREFIX = "tgt1_"
_CHECK_BYTES = 4
_REQUEST_LABEL, _ANSWER_LABEL = "enrolment request", "enrolment answer"
_HEAD = struct.Struct(">4s16s")
_MAGIC = b"TGE1"
_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """An invitation for one device."""

    root: bytes
    """The fleet root's public key, which is its own fingerprint."""
    box: bytes = field(repr=False)
    secret: bytes = field(repr=False)
    group: str
    url: str
    """Where the enrolment endpoint is; empty for a fleet that enrols by files."""

    @property
    def token_id(self) -> bytes:
        """Names the token without giving it away."""
        return hashlib.sha256(b"tidegate/1 token id" + self.secret).digest()[:16]

    def encode(self) -> str:
        """One word to hand over."""
        group = self.group.encode()
        data = self.root + self.box + self.secret + bytes([len(group)]) + group + self.url.encode()
        word = base64.urlsafe_b64encode(data + _checksum(data)).decode().rstrip("=")
        return _PREFIX + word

    @classmethod
    def decode(cls, word: str) -> Token:
        """Read what `encode` wrote.

        Raises:
            IdentityError: it is no token, or mistyped. The message never repeats it.
        """
        problem = "token: must be the whole word that 'tidegate keys token' printed"
        word = word.strip()
        if not word.startswith(_PREFIX):
            raise IdentityError(problem)
        try:
            body = word.removeprefix(_PREFIX)
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            data, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
            if check != _checksum(data):
                raise IdentityError(problem)
            group_bytes = data[80]
            group = check_name("token group", data[81 : 81 + group_bytes].decode())
            url = data[81 + group_bytes :].decode()
        except (binascii.Error, ValueError, IndexError):
            raise IdentityError(problem) from None
        return cls(root=data[:32], box=data[32:64], secret=data[64:80], group=group, url=url)


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(b"tidegate/1 token" + data).digest()[:_CHECK_BYTES]


def secret_digest(secret: bytes) -> bytes:
    """What the gateway keeps of a token's secret: 128 random bits need no slow hash."""
    return hashlib.sha256(b"tidegate/1 token secret" + secret).digest()


@dataclass(frozen=True, kw_only=True, slots=True)
class NewKeys:
    """What a device has made for itself before anybody knows it."""

    key: Ed25519PrivateKey = field(repr=False)
    answer_key: X25519PrivateKey = field(repr=False)
    tls_key_pem: bytes = field(repr=False)
    csr_pem: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedRequest:
    """What a gateway learns of a device that wants in."""

    secret: bytes = field(repr=False)
    public_key: bytes
    csr_pem: bytes = field(repr=False)
    answer_key: bytes = field(repr=False)
    digest: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Granted:
    """What a device gets."""

    group: str
    gateway_id: str
    device_id: DeviceId = field(repr=False)
    handle: str
    certificate_pem: bytes = field(repr=False)
    authorities_pem: bytes = field(repr=False)
    facts: bytes = field(repr=False)


def seal_request(token: Token, keys: NewKeys) -> bytes:
    """The device's request; it may be sent again as it is."""
    head = _HEAD.pack(_MAGIC, token.token_id)
    fields = {
        "token": token.token_id.hex(),
        "csr": keys.csr_pem.decode("ascii"),
        "answer_key": keys.answer_key.public_key().public_bytes_raw().hex(),
    }
    statement = statements.sign(keys.key, _REQUEST_LABEL, fields)
    plain = token.secret + keys.key.public_key().public_bytes_raw() + statement
    box = X25519PublicKey.from_public_bytes(token.box)
    return head + _SUITE.encrypt(plain, box, info=b"tidegate/1 enrol" + head)


def token_id_of(request: bytes) -> bytes:
    """Which token a request claims to have.

    Raises:
        SealError: it is no request.
    """
    if not _HEAD.size < len(request) <= MOST_MESSAGE_BYTES or not request.startswith(_MAGIC):
        raise SealError
    return request[len(_MAGIC) : _HEAD.size]


def open_request(request: bytes, box: X25519PrivateKey) -> OpenedRequest:
    """Open a request with the token's key; whether its secret is right is the caller's to see.

    Raises:
        SealError: damaged, sealed to another token, or the device has not the key it names.
    """
    token_id = token_id_of(request)
    head = request[: _HEAD.size]
    try:
        plain = _SUITE.decrypt(request[_HEAD.size :], box, info=b"tidegate/1 enrol" + head)
        secret, public = plain[:SECRET_BYTES], plain[SECRET_BYTES : SECRET_BYTES + 32]
        key = Ed25519PublicKey.from_public_bytes(public)
        fields = statements.verify(key, _REQUEST_LABEL, plain[SECRET_BYTES + 32 :])
        if statements.hexadecimal(fields, "token", 16) != token_id:
            raise SealError
        answer_key = statements.hexadecimal(fields, "answer_key", 32)
        # A point of low order would fail only when the answer is sealed.
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(answer_key))
        csr_pem = statements.text(fields, "csr").encode("ascii")
    except (InvalidTag, ValueError, IdentityError):
        raise SealError from None
    return OpenedRequest(
        secret=secret,
        public_key=public,
        csr_pem=csr_pem,
        answer_key=answer_key,
        digest=hashlib.sha256(request).digest(),
    )


def seal_answer(
    identity: GatewayIdentity, request: OpenedRequest, granted: Granted, *, now_s: float
) -> bytes:
    """The gateway's answer, readable by the device that asked."""
    fields = {
        "group": granted.group,
        "gateway": granted.gateway_id,
        "device_id": granted.device_id.hex(),
        "handle": granted.handle,
        "certificate": granted.certificate_pem.decode("ascii"),
        "authorities": granted.authorities_pem.decode("ascii"),
        "facts": granted.facts.hex(),
        "request": request.digest.hex(),
        "issued": int(now_s),
    }
    signed = statements.sign(identity.key, _ANSWER_LABEL, fields)
    certificate = identity.certificate
    plain = len(certificate).to_bytes(2, "big") + certificate + signed
    public = X25519PublicKey.from_public_bytes(request.answer_key)
    return _SUITE.encrypt(plain, public, info=b"tidegate/1 enrolled" + request.digest)


def open_answer(
    token: Token, keys: NewKeys, request: bytes, answer: bytes, *, now_s: float
) -> Granted:
    """Verify an answer against the root in the token: root -> gateway -> answer -> certificate.

    Raises:
        IdentityError: it is another request's, not of this fleet, or this clock is far off.
    """
    digest = hashlib.sha256(request).digest()
    try:
        plain = _SUITE.decrypt(answer, keys.answer_key, info=b"tidegate/1 enrolled" + digest)
    except (InvalidTag, ValueError):
        raise IdentityError("enrolment answer: damaged, or of another request") from None
    split = 2 + int.from_bytes(plain[:2], "big")
    root = Ed25519PublicKey.from_public_bytes(token.root)
    gateway = open_certificate(root, plain[2:split])
    fields = statements.verify(gateway.key, _ANSWER_LABEL, plain[split:])
    check_clock("enrolment answer", statements.integer(fields, "issued"), now_s)
    check_period("enrolment answer: the gateway's key", gateway.nbf_s, gateway.naf_s, now_s)
    granted = Granted(
        group=statements.text(fields, "group"),
        gateway_id=statements.text(fields, "gateway"),
        device_id=DeviceId(statements.hexadecimal(fields, "device_id", 16)),
        handle=check_name("enrolment answer handle", statements.text(fields, "handle")),
        certificate_pem=statements.text(fields, "certificate").encode("ascii"),
        authorities_pem=statements.text(fields, "authorities").encode("ascii"),
        facts=_hex(statements.text(fields, "facts")),
    )
    if statements.hexadecimal(fields, "request", 32) != digest:
        raise IdentityError("enrolment answer: of another request")
    who = (granted.group, granted.gateway_id)
    if who != (gateway.group, gateway.gateway_id) or granted.group != token.group:
        raise IdentityError("enrolment answer: speaks for another gateway or group")
    check_granted(granted, root, keys.tls_key_pem, now_s=now_s)
    return granted


def check_granted(
    granted: Granted, root: Ed25519PublicKey, tls_key_pem: bytes, *, now_s: float
) -> None:
    """Check that the certificate is of our key and handle, from an authority of the root's.

    Raises:
        IdentityError: it is not.
    """
    check_facts(root, granted.facts, granted.group, granted.authorities_pem)
    check_issued(granted.certificate_pem, granted.authorities_pem, tls_key_pem)
    facts = read_facts(granted.certificate_pem)
    if facts.common_name != granted.handle:
        raise IdentityError("certificate: names another handle than ours")
    check_period("certificate", facts.nbf_s, facts.naf_s, now_s)


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise IdentityError("facts: must be hexadecimal") from None
