"""Gateway keys that are no longer believed: the fleet root's signed list, and who keeps it.

An entry names a gateway and a time: every key that the root certified for it up to then is revoked,
so nobody needs to have the stolen key at hand, and the gateway goes on with one certified later. A
list holds all entries there are, and a number that grows; an older one never replaces a newer one.
Gateways carry the list in their adverts, and it travels as a file, too::

    statement of the fleet root, label "revoked gateways"
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tidegate.errors import IdentityError
from tidegate.link import statements
from tidegate.link.keyfiles import read_public, write_atomic
from tidegate.link.topics import check_name

logger = logging.getLogger(__name__)

REVOKED_FILE = "gateways.revoked"
"""In the folder of a fleet, a gateway or a device."""
MOST_REVOKED = 256
MOST_LIST_BYTES = 24 * 1024
"""An advert has room for this, in hexadecimal, beside everything else."""
_LABEL = "revoked gateways"


@dataclass(frozen=True, kw_only=True, slots=True)
class Revocations:
    """A verified list: of each gateway, until when its certified keys are revoked (Unix time)."""

    number: int = 0
    until_s: Mapping[str, int] = field(default_factory=dict)
    statement: bytes = field(default=b"", repr=False)

    def revokes(self, gateway_id: str, certified_s: int) -> bool:
        """Whether a key that was certified for this gateway then is revoked."""
        return certified_s <= self.until_s.get(gateway_id, -1)


NONE_REVOKED = Revocations()


def seal_revocations(
    root: Ed25519PrivateKey, group: str, before: Revocations, gateway_id: str, *, now_s: float
) -> Revocations:
    """A list with one entry more: whatever is certified for `gateway_id` by now is revoked.

    Its number is a time where it can be, so that one that was made from a backup is newer, too.

    Raises:
        IdentityError: there are too many.
    """
    check_name("gateway", gateway_id)
    until_s = {**before.until_s, gateway_id: max(int(now_s), before.until_s.get(gateway_id, 0))}
    if len(until_s) > MOST_REVOKED:
        raise IdentityError(f"{MOST_REVOKED} gateways are revoked: make a new fleet")
    number = max(before.number + 1, int(now_s))
    fields = {"group": group, "number": number, "until": until_s}
    statement = statements.sign(root, _LABEL, fields)
    if len(statement) > MOST_LIST_BYTES:
        raise IdentityError(f"revoked gateways: more than {MOST_LIST_BYTES} bytes of names")
    return Revocations(number=number, until_s=until_s, statement=statement)


def open_revocations(root: Ed25519PublicKey, group: str, statement: bytes) -> Revocations:
    """Verify a list against the pinned root.

    Raises:
        IdentityError: not signed by this root, of another group, or malformed.
    """
    if len(statement) > MOST_LIST_BYTES:
        raise IdentityError(f"revoked gateways: must be at most {MOST_LIST_BYTES} bytes")
    fields = statements.verify(root, _LABEL, statement)
    if statements.text(fields, "group") != group:
        raise IdentityError(f"revoked gateways: of another group than {group!r}")
    named = fields.get("until")
    if not isinstance(named, dict) or len(named) > MOST_REVOKED:
        raise IdentityError(f"revoked gateways: must be an object of at most {MOST_REVOKED}")
    until_s = {name: statements.integer(named, name) for name in named}
    return Revocations(
        number=statements.integer(fields, "number"), until_s=until_s, statement=statement
    )


class RevokedGateways:
    """The newest list that this end has seen, on its disk before it counts for good.

    A file that another process replaces by a newer one is noticed; one that it replaces by an older
    one is put right.

    Args:
        root: pinned.
        group: the fleet's.
        path: where it is kept; None keeps it in memory only.

    Raises:
        IdentityError: the file is damaged, or of another fleet.
    """

    def __init__(self, root: Ed25519PublicKey, group: str, path: Path | None) -> None:
        self._root, self._group, self._path = root, group, path
        self._seen: tuple[int, int] | None = None
        self.current = NONE_REVOKED
        self.refresh()

    def refresh(self) -> None:
        """Look at the file again if it was replaced.

        Raises:
            IdentityError: it is damaged; what was known still counts.
        """
        if self._path is None or (mark := _mark(self._path)) == self._seen:
            return
        self._seen = mark
        found = NONE_REVOKED
        if mark is not None:
            try:
                data = read_public(self._path, max_bytes=MOST_LIST_BYTES)
                found = open_revocations(self._root, self._group, data)
            except IdentityError as error:
                raise IdentityError(
                    f"{self._path}: {error}; bring the fleet's newest list (keys import-revoked)"
                ) from error
        if found.number > self.current.number:
            self.current = found
        elif found.number < self.current.number:
            self._write()

    def take(self, statement: bytes) -> bool:
        """Keep a list that came; True when it is newer than what was known.

        A disk that refuses does not keep it from counting: it is written again later.

        Raises:
            IdentityError: as `open_revocations`.
        """
        if statement == self.current.statement:
            return False
        offered = open_revocations(self._root, self._group, statement)
        try:
            # Another process may just have brought a newer one, which must not be written over.
            self.refresh()
        except IdentityError as error:
            logger.warning("%s", error)
        if offered.number <= self.current.number:
            return False
        self.current = offered
        self._write()
        return True

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            write_atomic(self._path, self.current.statement)
            self._seen = _mark(self._path)
        except OSError as error:
            # `refresh` finds it older and tries again.
            self._seen = (-1, -1)
            logger.warning("%s: not kept (%s)", self._path, error.strerror)


def read_revocations(folder: Path, root: Ed25519PublicKey, group: str) -> Revocations:
    """The list in a folder; none where there is no file.

    Raises:
        IdentityError: it is damaged, or of another fleet.
    """
    return RevokedGateways(root, group, folder / REVOKED_FILE).current


def import_revocations(folder: Path, statement: bytes) -> Revocations | None:
    """Bring a list to the folder of a device or a gateway; None when it has that or a newer one.

    The service may be running. A damaged list there gives way.

    Raises:
        IdentityError: the list is not of the folder's fleet, or the folder holds no keys.
    """
    root, group = _pinned(folder)
    offered = open_revocations(root, group, statement)
    try:
        if offered.number <= read_revocations(folder, root, group).number:
            return None
    except IdentityError as error:
        logger.warning("%s", error)
    write_atomic(folder / REVOKED_FILE, statement)
    return offered


def _pinned(folder: Path) -> tuple[Ed25519PublicKey, str]:
    """Root and group that a folder of keys goes by; no secret is read."""
    for marker in ("device.json", "gateway.json"):
        if not (folder / marker).exists():
            continue
        try:
            fields = json.loads(read_public(folder / marker))
            group = statements.text(fields, "group")
            if marker == "gateway.json":
                fields = {"root": read_public(folder / "root.pub").decode("ascii")}
            root = statements.hexadecimal(fields, "root", 32)
        except (ValueError, AttributeError):
            raise IdentityError(f"{folder / marker}: damaged") from None
        return Ed25519PublicKey.from_public_bytes(root), group
    raise IdentityError(f"{folder}: holds neither a gateway nor a device")


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino
