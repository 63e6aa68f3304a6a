"""Key files under a passphrase or behind a command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.errors import IdentityError
from tidegate.link import wrapping
from tidegate.link.keyfiles import PASSPHRASE, PASSPHRASE_FILE, read_key, write_atomic
from tidegate.link.wrapping import Cost, command_file, is_plain, is_wrapped, unwrap, wrap

CHEAP = Cost(log2_n=4, r=1, p=1)
SECRET = b"correct horse"
KEY = b"k" * 32


def _never() -> bytes:
    raise AssertionError("nobody is asked for a plain key")


@settings(deadline=None, max_examples=50)
@given(data=st.binary(max_size=200), passphrase=st.binary(min_size=8, max_size=40))
def test_what_is_wrapped_unwraps_under_its_passphrase_and_name_only(
    data: bytes, passphrase: bytes
) -> None:
    wrapped = wrap(data, passphrase, "root.key", cost=CHEAP)
    assert unwrap(wrapped, "root.key", lambda: passphrase) == data
    for name, other in (("root.key", passphrase + b"x"), ("gateway.key", passphrase)):
        with pytest.raises(IdentityError, match="wrong passphrase"):
            unwrap(wrapped, name, lambda other=other: other)  # type: ignore[misc]


def test_no_byte_of_a_wrapped_key_can_be_changed() -> None:
    wrapped = wrap(KEY, SECRET, "a.key", cost=CHEAP)
    for place in range(8, len(wrapped)):
        broken = wrapped[:place] + bytes([wrapped[place] ^ 0x10]) + wrapped[place + 1 :]
        with pytest.raises(IdentityError):
            unwrap(broken, "a.key", lambda: SECRET)
    for length in range(8, len(wrapped)):
        with pytest.raises(IdentityError):
            unwrap(wrapped[:length], "a.key", lambda: SECRET)


def test_a_file_cannot_ask_for_all_memory() -> None:
    wrapped = bytearray(wrap(KEY, SECRET, "a.key", cost=CHEAP))
    for place, value in ((8, 18), (9, 9), (10, 9), (8, 0)):
        greedy = bytearray(wrapped)
        greedy[place] = value
        with pytest.raises(IdentityError, match="scrypt"):
            unwrap(bytes(greedy), "a.key", _never)


def test_a_plain_key_asks_nobody_and_a_short_passphrase_is_refused() -> None:
    assert unwrap(KEY, "a.key", _never) == KEY
    assert is_plain(KEY)
    wrapped = wrap(KEY, SECRET, "a.key", cost=CHEAP)
    assert is_wrapped(wrapped)
    assert not is_plain(wrapped)
    with pytest.raises(IdentityError, match="at least 8"):
        wrap(KEY, b"1234567", "a.key", cost=CHEAP)


def test_a_service_takes_its_passphrase_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, words = tmp_path / "a.key", tmp_path / "passphrase"
    write_atomic(path, wrap(KEY, SECRET, "a.key", cost=CHEAP))
    monkeypatch.delenv(PASSPHRASE, raising=False)
    monkeypatch.delenv(PASSPHRASE_FILE, raising=False)
    with pytest.raises(IdentityError, match=PASSPHRASE_FILE):
        read_key(path)
    monkeypatch.setenv(PASSPHRASE, SECRET.decode())
    assert read_key(path) == KEY
    write_atomic(words, SECRET + b"\r\nsecond line\n")
    monkeypatch.setenv(PASSPHRASE_FILE, str(words))
    monkeypatch.setenv(PASSPHRASE, "wrong passphrase")
    assert read_key(path) == KEY
    words.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        read_key(path)


def test_a_command_gives_the_key_without_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    program = f"import sys; sys.stdout.buffer.write({KEY!r})"
    write_atomic(path, command_file([sys.executable, "-c", program, "; rm -rf $HOME"]))
    assert read_key(path) == KEY


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ([sys.executable, "-c", "print('s3cret'); raise SystemExit(3)"], "status 3"),
        ([sys.executable, "-c", "pass"], "printed 0 bytes"),
        (["no-such-program-here"], "cannot be run"),
        ([], "JSON list"),
    ],
)
def test_a_command_that_fails_is_named_and_its_output_is_not(
    command: list[str], problem: str
) -> None:
    with pytest.raises(IdentityError, match=problem) as refused:
        unwrap(command_file(command), "a.key", _never)
    assert "s3cret" not in str(refused.value)


def test_a_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapping, "COMMAND_TIMEOUT_S", 0.1)
    hanging = command_file([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(IdentityError, match=r"within 0\.1 s"):
        unwrap(hanging, "a.key", _never)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'"ls"', b"["])
def test_a_command_file_has_a_list_of_words(text: bytes) -> None:
    with pytest.raises(IdentityError, match="JSON list"):
        unwrap(b"tidegate-unwrap-command 1\n" + text, "a.key", _never)
