"""Writes clocks and power modes as root for a daemon that is not; imports Python's own only.

It obeys lines of ASCII on a Unix socket, one client at a time, and answers each with `ok VALUE`,
what was read back, or `error WHY`:

    freq POLICY KHZ | governor POLICY NAME | epp POLICY NAME | nvpmodel ID | hello | restore

A client names numbers and words, never a path; `power_board` says what it may. When the client
goes, or the helper ends, everything is as it was found; after a kill, when the helper begins again:
what was found is in a file beside the socket.

    tidegate-power-helper --socket /run/tidegate-power/socket --group tidegate
"""

from __future__ import annotations

import argparse
import errno
import grp
import os
import pwd
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tidegate.edge.energy.power_board import PowerBoard
from tidegate.edge.energy.power_kept import Kept, Refused

_MOST_LINE = 64
_FIRST_S = 10.0
"""That a client may take to ask for something; later it may be silent, as in a mode that stays."""
_TURNED_AWAY_S = 0.5
_NO_LINE = b"error not a line of this protocol\n"
_BURST, _PER_S = 200, 50.0
"""Requests: a switch is three for each policy, of which there are a dozen at most."""


class Allowance:
    """So many requests at once, and so many a second in the long run."""

    def __init__(self, now_s: float) -> None:
        self._left, self._at_s = float(_BURST), now_s

    def take(self, now_s: float) -> bool:
        """Whether one more request may be done."""
        self._left = min(float(_BURST), self._left + (now_s - self._at_s) * _PER_S)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


def allowed(uid: int, gid: int, group: int) -> bool:
    """Whether a process of these ids may ask: root's, or of the group."""
    if uid == 0 or gid == group:
        return True
    try:
        return pwd.getpwuid(uid).pw_name in grp.getgrgid(group).gr_mem
    except KeyError:
        return False


def serve(listener: socket.socket, board: PowerBoard, group: int) -> None:
    """One client after another, until a signal ends it; everything is restored between them."""
    allowance = Allowance(time.monotonic())
    while True:
        client, _ = listener.accept()
        with client:
            pid, uid, gid = _peer(client)
            try:
                if allowed(uid, gid, group):
                    _talk(client, listener, board, allowance, f"process {pid} of user {uid}")
                else:
                    _log(f"a process of user {uid} was refused")
                    _turn_away(client, "not allowed: not of the group")
            except OSError as error:
                _log(f"a client was lost: {error.strerror}")
        for why in board.restore():
            _log(f"not restored: {why}")


def _peer(client: socket.socket) -> tuple[int, int, int]:
    """Process, user and group of who is at the other end, as the kernel says."""
    told = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", told)
    return pid, uid, gid


def _turn_away(client: socket.socket, why: str) -> None:
    client.settimeout(_TURNED_AWAY_S)
    client.recv(_MOST_LINE)  # so that it hears why, and not of a broken pipe
    client.sendall(f"error {why}\n".encode("ascii"))


def _talk(
    client: socket.socket,
    listener: socket.socket,
    board: PowerBoard,
    allowance: Allowance,
    name: str,
) -> None:
    """Answer a client's lines until it goes or sends what is none; others hear that it is here."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
    held, asked, first_by_s = b"", False, time.monotonic() + _FIRST_S
    while True:
        wait_s = None if asked else max(0.0, first_by_s - time.monotonic())
        ready, _, _ = select.select([client, listener], [], [], wait_s)
        if not ready:
            client.sendall(b"error nothing was asked for: make room for another\n")
            return
        # This one first: it may just have gone, and then another's turn has come.
        if client not in ready:
            _tell_another(listener, name)
            continue
        data = client.recv(4096)
        *lines, held = (held + data).split(b"\n")
        asked = asked or bool(lines)
        for line in lines:
            if not _answered(line, client, board, allowance):
                return
        if not data or len(held) > _MOST_LINE:
            if data:
                client.sendall(_NO_LINE)
            return


def _tell_another(listener: socket.socket, name: str) -> None:
    """Turn away who comes while another client is here."""
    with suppress(OSError):  # it went, or says nothing
        other, _ = listener.accept()
        with other:
            _turn_away(other, f"busy: {name} has it")


def _answered(line: bytes, client: socket.socket, board: PowerBoard, allowance: Allowance) -> bool:
    """Whether it was a line of this protocol."""
    if len(line) > _MOST_LINE or not line.isascii() or not line.decode().isprintable():
        client.sendall(_NO_LINE)
        return False
    text = line.decode("ascii")
    answer = "error too many requests"
    if allowance.take(time.monotonic()):
        answer = board.obey(text)
        _log(f"{text}: {answer}")
    client.sendall(answer.encode("ascii", "replace") + b"\n")
    return True


@contextmanager
def listening(path: Path, group: int) -> Iterator[socket.socket]:
    """A socket that root and the group can reach, and that goes in the end.

    One that a dead helper left is replaced; anything else of that name is left alone.

    Raises:
        OSError: the name is taken, or cannot be had.
    """
    _free(path)
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        made = path.lstat()
        try:
            if made.st_gid != group:
                os.chown(path, -1, group)
            listener.listen(4)
            yield listener
        finally:
            with suppress(FileNotFoundError):
                now = path.lstat()
                if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):
                    path.unlink()


def _free(path: Path) -> None:
    """Remove a socket that nobody listens on."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
    raise OSError(errno.EADDRINUSE, "another helper listens on it")


def _log(text: str) -> None:
    print(f"tidegate-power-helper: {text}", file=sys.stderr, flush=True)


def _end(*_: object) -> None:
    raise SystemExit(0)


def main(words: list[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then restore."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--group", required=True, help="whose processes may ask")
    parser.add_argument("--sysroot", type=Path, default=Path("/"), help="another root, for tests")
    args = parser.parse_args(words)
    try:
        group = int(args.group) if args.group.isdecimal() else grp.getgrnam(args.group).gr_gid
    except KeyError:
        parser.error(f"group {args.group!r} is not there: make it, or name another")
    try:
        with closing(Kept(args.socket.parent)) as kept:
            _run(PowerBoard(args.sysroot, kept), args.socket, group)
    except Refused as why:
        parser.error(str(why))
    except OSError as error:
        parser.error(f"{args.socket}: {error.strerror}")
    return 0


def _run(board: PowerBoard, path: Path, group: int) -> None:
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in ends:
        signal.signal(number, _end)
    try:
        for why in board.recover():
            _log(f"not restored: {why}")
        with listening(path, group) as listener:
            _log(f"listening on {path}, {len(board.policies)} policies of clocks")
            serve(listener, board, group)
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_IGN)
        for why in board.restore():
            _log(f"not restored: {why}")


if __name__ == "__main__":
    sys.exit(main())
