"""Files that hold secrets: written atomically with mode 0600, never read when others could.

A secret may also be wrapped by a passphrase or come from a command: see `wrapping`.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from tidegate.errors import IdentityError, LinkError
from tidegate.link.wrapping import PassphraseSource, unwrap, wrap

KEY_BYTES = 32
"""Ed25519 seeds, X25519 scalars and local at-rest keys are all this long."""


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, mode 0600; a crash leaves either the old file or the new one.

    The file and its directory are fsynced. A missing directory is made with mode 0700.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_secret(path: Path, data: bytes, *, passphrase: bytes | None) -> None:
    """Replace `path` by a secret, wrapped if there is a passphrase.

    Raises:
        IdentityError: the passphrase is too short.
    """
    write_atomic(path, data if passphrase is None else wrap(data, passphrase, path.name))


def read_public(path: Path, *, max_bytes: int = 65536) -> bytes:
    """Read a small file that holds no secret.

    Raises:
        IdentityError: it is missing or larger than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > max_bytes:
        raise IdentityError(f"{path}: larger than {max_bytes} bytes")
    return data


PASSPHRASE = "TIDEGATE_PASSPHRASE"
PASSPHRASE_FILE = "TIDEGATE_PASSPHRASE_FILE"


def passphrase_from_environment() -> bytes:
    """The passphrase of a service, which has nobody to ask.

    Raises:
        IdentityError: neither variable is set, or the file cannot be read or is not private.
    """
    if (name := os.environ.get(PASSPHRASE_FILE)) is not None:
        return read_passphrase(Path(name))
    if (passphrase := os.environ.get(PASSPHRASE)) is not None:
        return passphrase.encode()
    raise IdentityError(f"a key is wrapped by a passphrase: set {PASSPHRASE_FILE} or {PASSPHRASE}")


def read_passphrase(path: Path) -> bytes:
    """The first line of a private file.

    Raises:
        IdentityError: it cannot be read, or others can.
    """
    return _read_private(path, 4096).split(b"\n", 1)[0].rstrip(b"\r")


def read_secret(
    path: Path,
    *,
    max_bytes: int = 65536,
    passphrase: PassphraseSource = passphrase_from_environment,
) -> bytes:
    """Read a secret file after checking that nobody else can.

    Args:
        path: holds the secret, plain or wrapped, or the command that prints it.
        max_bytes: more is refused.
        passphrase: asked when it is wrapped.

    Raises:
        IdentityError: it is missing, too large, readable by group or others, or does not unwrap.
    """
    return unwrap(_read_private(path, max_bytes), path.name, passphrase)


def rewrite_secret(path: Path, passphrase: bytes, *, before: PassphraseSource) -> None:
    """Wrap a key file, or give it another passphrase.

    On flash the old block may outlive that; wrap before a key matters.

    Raises:
        IdentityError: it cannot be read with the passphrase it had, or the new one is too short.
    """
    write_secret(path, read_secret(path, passphrase=before), passphrase=passphrase)


def _read_private(path: Path, max_bytes: int) -> bytes:
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise IdentityError(
            f"{path}: mode {mode:04o} lets others read this key; run: chmod 600 {path}"
        )
    return read_public(path, max_bytes=max_bytes)


def read_key(path: Path, *, passphrase: PassphraseSource = passphrase_from_environment) -> bytes:
    """Read a 32-byte key.

    Raises:
        IdentityError: as `read_secret`, or it is not exactly 32 bytes.
    """
    data = read_secret(path, passphrase=passphrase)
    if len(data) != KEY_BYTES:
        raise IdentityError(f"{path}: {len(data)} bytes: a key file has exactly {KEY_BYTES}")
    return data


def load_or_make_key(path: Path) -> bytes:
    """Read the local key at `path`, making a random one on first use.

    Raises:
        IdentityError: as `read_key`.
    """
    if not path.exists():
        write_atomic(path, secrets.token_bytes(KEY_BYTES))
    return read_key(path)


class FolderLock:
    """One process at a time works with a folder of keys; the kernel lets go when it dies.

    Raises:
        LinkError: another one does, or the folder cannot be locked.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise LinkError(f"{folder}: cannot be locked ({error.strerror})") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            if isinstance(error, BlockingIOError):
                raise LinkError(f"{folder}: another process is using these keys") from None
            raise LinkError(f"{folder}: cannot be locked ({error.strerror})") from error

    def release(self) -> None:
        """Let another process have the folder."""
        os.close(self._descriptor)
