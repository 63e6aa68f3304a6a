"""Gateway prekeys and the signed advert that publishes them.

A prekey is a key pair that devices seal to without asking first, one per suite. It is made every
24 h, valid for 72 h and erased after that, which bounds what a stolen gateway disk can open. The
advert also carries the suite list, so that nobody in between can talk a device into a weaker one,
and is signed by the gateway key that the fleet root certified::

    advert  cert_bytes u16 | certificate | signature[64] | canonical JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tidegate.errors import CapacityError, IdentityError
from tidegate.link import statements
from tidegate.link.clock import CLOCK_SKEW_S, check_period
from tidegate.link.identity import GatewayIdentity, open_certificate
from tidegate.link.keyfiles import read_secret, write_atomic
from tidegate.link.suites import (
    PREFERENCE,
    PRIVATE_BYTES,
    SUITES,
    PrivatePrekey,
    PublicPrekey,
    check_suites,
    works,
)

ADVERT_LABEL = "advert"
ROTATE_AFTER_S = 24 * 3600
VALID_FOR_S = 72 * 3600
MAX_ADVERT_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Prekey:
    """The public half of a prekey; times are Unix seconds."""

    prekey_id: bytes
    public: PublicPrekey = field(repr=False)
    nbf_s: int
    naf_s: int

    @property
    def suite(self) -> int:
        return self.public.suite


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOffer:
    """A model that a gateway serves, and the most tokens that prompt and answer may have."""

    id: str
    context_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Advert:
    """What a gateway says about itself: `load` is 0 (idle) to 1 (full).

    `gateway_key` is the key that its certificate names: it signed this, and signs answers.
    """

    group: str
    gateway_id: str
    gateway_key: Ed25519PublicKey = field(repr=False, compare=False)
    version: int
    issued_s: int
    expires_s: int
    suites: tuple[int, ...]
    models: tuple[ModelOffer, ...]
    load: float
    prekeys: tuple[Prekey, ...]
    certified_s: int = field(default=0, compare=False)
    """When the root certified `gateway_key`."""
    revocations: bytes = field(default=b"", repr=False)
    """The fleet's list of revoked gateways, as `gateway_revocation` reads it; nothing for none."""
    http: str = ""
    """Where it takes devices over HTTP; empty for nowhere."""

    def prekey(self, now_s: float, suites: Sequence[int] = PREFERENCE) -> Prekey | None:
        """The youngest prekey that is valid at `now_s`, of the first of `suites` that has one."""
        for suite in suites:
            usable = [
                prekey
                for prekey in self.prekeys
                if prekey.suite == suite
                and suite in self.suites
                # Rotation leaves the youngest days to live, so its end needs no tolerance.
                and prekey.nbf_s - CLOCK_SKEW_S <= now_s < prekey.naf_s
            ]
            if usable:
                return max(usable, key=lambda prekey: prekey.nbf_s)
        return None


def seal_advert(identity: GatewayIdentity, advert: Advert) -> bytes:
    """Encode and sign `advert`."""
    fields: dict[str, object] = {
        "group": advert.group,
        "gateway": advert.gateway_id,
        "version": advert.version,
        "issued": advert.issued_s,
        "expires": advert.expires_s,
        "suites": list(advert.suites),
        "models": [{"id": model.id, "context": model.context_tokens} for model in advert.models],
        "load": advert.load,
        "prekeys": [
            {
                "suite": prekey.suite,
                "id": prekey.prekey_id.hex(),
                "public": prekey.public.raw.hex(),
                "nbf": prekey.nbf_s,
                "naf": prekey.naf_s,
            }
            for prekey in advert.prekeys
        ],
    }
    if advert.revocations:
        fields["revoked"] = advert.revocations.hex()
    if advert.http:
        fields["http"] = advert.http
    certificate = identity.certificate
    signed = statements.sign(identity.key, ADVERT_LABEL, fields)
    return len(certificate).to_bytes(2, "big") + certificate + signed


def open_advert(payload: bytes, *, root: Ed25519PublicKey, group: str, now_s: float) -> Advert:
    """Verify an advert: root -> certificate -> gateway key -> advert, and that it is of today.

    Raises:
        IdentityError: too large, not signed by this fleet, of another group, or not valid now.
    """
    if len(payload) > MAX_ADVERT_BYTES:
        raise IdentityError(f"advert: {len(payload)} bytes: must be at most {MAX_ADVERT_BYTES}")
    split = 2 + int.from_bytes(payload[:2], "big")
    certificate = open_certificate(root, payload[2:split])
    fields = statements.verify(certificate.key, ADVERT_LABEL, payload[split:])
    advert = Advert(
        group=statements.text(fields, "group"),
        gateway_id=statements.text(fields, "gateway"),
        gateway_key=certificate.key,
        version=statements.integer(fields, "version"),
        issued_s=statements.integer(fields, "issued"),
        expires_s=statements.integer(fields, "expires"),
        suites=tuple(
            suite for suite in statements.items(fields, "suites", most=16) if isinstance(suite, int)
        ),
        models=tuple(
            offer
            for item in statements.items(fields, "models", most=256)
            if (offer := _open_offer(item)) is not None
        ),
        load=statements.number(fields, "load"),
        prekeys=tuple(
            prekey
            for item in statements.items(fields, "prekeys", most=16)
            if (prekey := _open_prekey(item)) is not None
        ),
        certified_s=certificate.nbf_s,
        revocations=_open_revocations(fields),
        http=statements.text(fields, "http") if "http" in fields else "",
    )
    if (advert.group, advert.gateway_id) != (certificate.group, certificate.gateway_id):
        raise IdentityError("advert: speaks for another gateway than its certificate")
    if advert.group != group:
        raise IdentityError(f"advert: group {advert.group!r}: must be {group!r}")
    check_period("advert", advert.issued_s, advert.expires_s, now_s)
    check_period("advert: the gateway's certificate", certificate.nbf_s, certificate.naf_s, now_s)
    return advert


def _open_revocations(fields: dict[str, object]) -> bytes:
    try:
        return bytes.fromhex(statements.text(fields, "revoked")) if "revoked" in fields else b""
    except ValueError:
        raise IdentityError("revoked: must be hexadecimal") from None


def _open_offer(item: object) -> ModelOffer | None:
    """None for one we cannot read: a newer gateway may say more about its models."""
    if not isinstance(item, dict):
        return None
    try:
        return ModelOffer(
            id=statements.text(item, "id"),
            context_tokens=statements.integer(item, "context"),
        )
    except IdentityError:
        return None


def _open_prekey(item: object) -> Prekey | None:
    """A prekey of the advert; one of a suite that this program cannot do is skipped."""
    if not isinstance(item, dict):
        return None
    number = item.get("suite")
    suite = SUITES.get(number) if isinstance(number, int) else None
    if suite is None or not works(suite.number):
        return None
    raw = statements.hexadecimal(item, "public", suite.public_bytes)
    try:
        public = PublicPrekey.load(suite.number, raw)
    except ValueError as error:
        raise IdentityError(f"public: no key of suite {suite.number}") from error
    return Prekey(
        prekey_id=statements.hexadecimal(item, "id", 8),
        public=public,
        nbf_s=statements.integer(item, "nbf"),
        naf_s=statements.integer(item, "naf"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """A prekey with its private half."""

    public: Prekey
    private: PrivatePrekey = field(repr=False)


class PrekeyStore:
    """The gateway's private prekeys in one 0600 file, rewritten when the set changes.

    Prekeys are made for every one of `suites`; those of a suite that is no longer among them are
    erased at the next `rotate`.
    """

    def __init__(self, path: Path, *, suites: Sequence[int] = PREFERENCE) -> None:
        self.suites = check_suites(suites)
        self._path = path
        self._held = _read(path) if path.exists() else []

    def rotate(self, now_s: float, *, at_once: bool = False) -> bool:
        """Make prekeys when the youngest are a day old and drop expired ones; True on a change.

        `at_once` makes them however young the youngest are.

        One from the future was made while the clock was wrong: no device would use it until then.
        Dropping rewrites the file. On flash the old block may outlive that; full-disk encryption
        is what helps there.

        Raises:
            CapacityError: the disk refuses; the set is what it was.
        """
        held = [
            item
            for item in self._held
            if now_s < item.public.naf_s
            and item.public.nbf_s <= now_s + CLOCK_SKEW_S
            and item.public.suite in self.suites
        ]
        for suite in self.suites:
            youngest = _youngest(held, suite)
            if at_once or youngest is None or now_s >= youngest.public.nbf_s + ROTATE_AFTER_S:
                held.append(_make(suite, int(now_s)))
        if held == self._held:
            return False
        try:
            _write(self._path, held)
        except OSError as error:
            raise CapacityError(
                f"{self._path}: prekeys cannot be written ({error.strerror})"
            ) from error
        self._held = held
        return True

    def __len__(self) -> int:
        """How many are held, of all suites and ages."""
        return len(self._held)

    def public(self, now_s: float) -> Sequence[Prekey]:
        """The prekeys to advertise: the youngest of each suite, in the order of `suites`.

        Older ones only open what is still under way.
        """
        living = [item for item in self._held if now_s < item.public.naf_s]
        youngest = [_youngest(living, suite) for suite in self.suites]
        return [item.public for item in youngest if item is not None]

    def find(self, suite: int, prekey_id: bytes, now_s: float) -> PrivatePrekey | None:
        """The private half, or None when unknown or no longer valid."""
        for item in self._held:
            if (item.public.suite, item.public.prekey_id) == (suite, prekey_id):
                return item.private if now_s < item.public.naf_s else None
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldPrekey:
    """What may be shown of a prekey that a gateway holds; it is erased when it ends."""

    prekey_id: bytes
    suite: int
    nbf_s: int
    naf_s: int


def held_prekeys(path: Path) -> list[HeldPrekey]:
    """The prekeys in a gateway's file, the youngest first; of their secrets nothing.

    Raises:
        IdentityError: the file is damaged, or others can read it.
    """
    if not path.exists():
        return []
    shown = [
        HeldPrekey(
            prekey_id=held.public.prekey_id,
            suite=held.public.suite,
            nbf_s=held.public.nbf_s,
            naf_s=held.public.naf_s,
        )
        for held in _read(path)
    ]
    return sorted(shown, key=lambda one: (-one.nbf_s, -one.suite))


def _youngest(held: Sequence[_Held], suite: int) -> _Held | None:
    own = [item for item in held if item.public.suite == suite]
    return max(own, key=lambda item: item.public.nbf_s, default=None)


def _make(suite: int, now_s: int) -> _Held:
    private = PrivatePrekey.generate(suite)
    prekey_id = hashlib.sha256(b"tidegate/1 prekey" + private.public.raw).digest()[:8]
    prekey = Prekey(
        prekey_id=prekey_id, public=private.public, nbf_s=now_s, naf_s=now_s + VALID_FOR_S
    )
    return _Held(public=prekey, private=private)


def _write(path: Path, held: Sequence[_Held]) -> None:
    rows = [
        {
            "suite": item.public.suite,
            "private": item.private.raw.hex(),
            "id": item.public.prekey_id.hex(),
            "nbf": item.public.nbf_s,
            "naf": item.public.naf_s,
        }
        for item in held
    ]
    write_atomic(path, json.dumps({"prekeys": rows}).encode())


def _read(path: Path) -> list[_Held]:
    data = read_secret(path)
    try:
        return [_held(row) for row in json.loads(data)["prekeys"]]
    except (ValueError, KeyError, TypeError, AttributeError, IdentityError) as error:
        raise IdentityError(f"{path}: damaged; remove it and new prekeys are made") from error


def _held(row: dict[str, object]) -> _Held:
    suite = statements.integer(row, "suite")
    raw = statements.hexadecimal(row, "private", PRIVATE_BYTES)
    private = PrivatePrekey.load(suite, raw)
    prekey = Prekey(
        prekey_id=statements.hexadecimal(row, "id", 8),
        public=private.public,
        nbf_s=statements.integer(row, "nbf"),
        naf_s=statements.integer(row, "naf"),
    )
    return _Held(public=prekey, private=private)
