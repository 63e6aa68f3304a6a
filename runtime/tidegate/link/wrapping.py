r"""Key files that are not plain on the disk: wrapped by a passphrase, or fetched by a command.

A wrapped file is scrypt and ChaCha20-Poly1305, bound to the file's name, so that one key cannot be
put in another's place::

    "TGWRAP1\n" | log2(N) u8 | r u8 | p u8 | salt[16] | nonce[12] | ciphertext and tag

A command file holds no secret. It names a program that prints the key, such as `tpm2_unseal` or
`pkcs11-tool`; it is run without a shell::

    tidegate-unwrap-command 1
    ["tpm2_unseal", "-c", "0x81000001"]
"""

from __future__ import annotations

import json
import secrets
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from tidegate.errors import IdentityError

PassphraseSource = Callable[[], bytes]
"""Asked only when a file turns out to be wrapped."""

MIN_PASSPHRASE_BYTES = 8
COMMAND_TIMEOUT_S = 60.0
"""A token that waits for a touch needs a while."""
_MAGIC = b"TGWRAP1\n"
_COMMAND = b"tidegate-unwrap-command 1\n"
_HEAD = struct.Struct(">8sBBB16s12s")
_MOST_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """scrypt's parameters; memory is 128 * r * N bytes."""

    log2_n: int = 15
    r: int = 8
    p: int = 3
    """OWASP's password storage sheet has N = 2^15, r = 8, p = 3 as equal to N = 2^17, p = 1; it
    takes 32 MiB, which a small device can spare for a moment."""


MOST_COST = Cost(log2_n=17, r=8, p=8)
"""What a file may ask of the machine that opens it: 128 MiB at most."""


def wrap(data: bytes, passphrase: bytes, name: str, *, cost: Cost | None = None) -> bytes:
    """Encrypt a key for the file called `name`.

    Raises:
        IdentityError: the passphrase is too short.
    """
    if len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise IdentityError(f"passphrase: must have at least {MIN_PASSPHRASE_BYTES} bytes")
    cost = cost or Cost()
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    head = _HEAD.pack(_MAGIC, cost.log2_n, cost.r, cost.p, salt, nonce)
    key = _derive(passphrase, salt, cost)
    return head + ChaCha20Poly1305(key).encrypt(nonce, data, head + name.encode())


def is_plain(data: bytes) -> bool:
    """Whether `data` is the key itself."""
    return not data.startswith((_MAGIC, _COMMAND))


def is_wrapped(data: bytes) -> bool:
    """Whether `data` needs a passphrase."""
    return data.startswith(_MAGIC)


def unwrap(data: bytes, name: str, passphrase: PassphraseSource) -> bytes:
    """The key in a file's content, whatever form it has.

    Raises:
        IdentityError: wrong passphrase, damaged, or the command did not print a key.
    """
    if data.startswith(_COMMAND):
        return _run(data[len(_COMMAND) :], name)
    if not data.startswith(_MAGIC):
        return data
    if len(data) < _HEAD.size:
        raise IdentityError(f"{name}: wrapped key is cut off")
    _, log2_n, r, p, salt, nonce = _HEAD.unpack_from(data)
    if not (1 <= log2_n <= MOST_COST.log2_n and 1 <= r <= MOST_COST.r and 1 <= p <= MOST_COST.p):
        raise IdentityError(f"{name}: wrapped key asks for more scrypt than {MOST_COST}")
    key = _derive(passphrase(), salt, Cost(log2_n=log2_n, r=r, p=p))
    aad = data[: _HEAD.size] + name.encode()
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, data[_HEAD.size :], aad)
    except InvalidTag:
        raise IdentityError(f"{name}: wrong passphrase, damaged, or another file's key") from None


def command_file(command: list[str]) -> bytes:
    """The content of a command file."""
    return _COMMAND + json.dumps(command).encode() + b"\n"


def _derive(passphrase: bytes, salt: bytes, cost: Cost) -> bytes:
    try:
        scrypt = Scrypt(salt=salt, length=32, n=2**cost.log2_n, r=cost.r, p=cost.p)
        return scrypt.derive(passphrase)
    except (ValueError, MemoryError):
        raise IdentityError(f"wrapped key: this machine cannot do {cost}") from None


def _run(text: bytes, name: str) -> bytes:
    """What the command prints. Its output is in no message: it may hold the key."""
    try:
        command = json.loads(text)
    except ValueError:
        command = None
    words = isinstance(command, list) and all(isinstance(word, str) for word in command)
    if not words or not command:
        raise IdentityError(f"{name}: its second line must be a JSON list of strings")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, ValueError) as error:
        raise IdentityError(f"{name}: {command[0]!r} cannot be run ({error})") from None
    except subprocess.TimeoutExpired:
        raise IdentityError(
            f"{name}: {command[0]!r} printed no key within {COMMAND_TIMEOUT_S:g} s"
        ) from None
    if done.returncode != 0 or not 0 < len(done.stdout) <= _MOST_BYTES:
        raise IdentityError(
            f"{name}: {command[0]!r} ended with status {done.returncode} and printed"
            f" {len(done.stdout)} bytes: must be 0 and the key"
        )
    return done.stdout
