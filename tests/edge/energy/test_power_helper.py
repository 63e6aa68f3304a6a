"""The root helper as a process: what it obeys and refuses, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from powerboards import JETSONS, cpufreq_of, write_cpufreq, write_jetson

from tidegate.edge.energy import power_helper
from tidegate.edge.energy.power_helper import Allowance, PowerBoard, allowed, policy_folders
from tidegate.edge.energy.power_writes import HelperWrites
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.switches import open_switch
from tidegate.errors import ActuationError

SUPER = "jetson-orin-nano-8gb-super"
OTHER_UID = 65534

T = TypeVar("T")


@pytest.fixture
def board(tmp_path: Path) -> Path:
    return write_jetson(write_cpufreq(tmp_path / "board", 2), JETSONS[SUPER])


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for the socket that other users can reach, with a short name."""
    with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "socket"


@contextmanager
def helper(root: Path, path: Path) -> Iterator[subprocess.Popen[str]]:
    """The helper on `root`, ended in the end as systemd ends it."""
    words = ["--socket", str(path), "--group", str(os.getgid()), "--sysroot", str(root)]
    process = subprocess.Popen(
        [sys.executable, "-I", power_helper.__file__, *words],
        stderr=subprocess.PIPE,
        text=True,
        env={},
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "listening on" in line, line
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
        assert process.returncode in (0, -signal.SIGKILL), told


def asked(path: Path, data: bytes) -> bytes:
    """All that is answered until the helper ends the connection or is silent."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(path))
        with suppress(BrokenPipeError):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        found = b""
        with suppress(ConnectionResetError):  # it ended with something unread
            while more := client.recv(4096):
                found += more
        return found


def until(wanted: T, look: Callable[[], T]) -> None:
    deadline = time.monotonic() + 10
    while look() != wanted:
        assert time.monotonic() < deadline, look()
        time.sleep(0.01)


@pytest.mark.system
def test_it_writes_what_a_client_may_ask_for_and_restores_when_the_client_goes(
    board: Path, place: Path
) -> None:
    with helper(board, place):
        writes = HelperWrites(place)
        assert writes.ask("freq 0 2000000") == "2000000"
        assert writes.ask("governor 1 performance") == "performance"
        assert writes.ask("epp 1 power") == "power"
        assert writes.ask("nvpmodel 0") == "0"
        assert cpufreq_of(board, "scaling_max_freq") == ["2000000", "3400000"]
        assert cpufreq_of(board, "energy_performance_preference")[1] == "power"
        writes.close()
        until(["3400000"] * 2, lambda: cpufreq_of(board, "scaling_max_freq"))
        until(
            ["balance_performance"] * 2, lambda: cpufreq_of(board, "energy_performance_preference")
        )
        assert cpufreq_of(board, "scaling_governor") == ["powersave"] * 2
        until("pmode:0001", (board / "var/lib/nvpmodel/status").read_text)


@pytest.mark.system
def test_it_restores_when_it_is_ended_and_its_client_says_how_to_go_on(
    board: Path, place: Path
) -> None:
    with helper(board, place) as process:
        writes = HelperWrites(place)
        writes.ask("freq 0 400000")
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
        assert cpufreq_of(board, "scaling_max_freq") == ["3400000"] * 2
        assert not place.exists()
        with pytest.raises(ActuationError, match=r"does not answer: .*; start tidegate-power-help"):
            writes.ask("freq 0 400000")
    with helper(board, place):
        assert writes.ask("freq 0 400000") == "400000", "it connects again"
        writes.close()


@pytest.mark.system
def test_a_second_daemon_waits_for_its_turn_and_is_told_why(
    board: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with helper(board, place):
        first = HelperWrites(place)
        monkeypatch.setattr("tidegate.edge.energy.power_writes._ANSWER_S", 0.2)
        with pytest.raises(ActuationError, match="does not answer: another daemon has it"):
            HelperWrites(place)
        first.close()
        monkeypatch.undo()
        second = HelperWrites(place)
        assert second.ask("freq 1 1000000") == "1000000"
        second.close()


@pytest.mark.system
def test_a_socket_that_a_killed_helper_left_is_replaced(board: Path, place: Path) -> None:
    with helper(board, place) as process:
        process.kill()
        process.wait(timeout=20)
        assert place.exists()
    with helper(board, place):
        assert asked(place, b"hello\n") == b"ok 2\n"


REFUSED = {
    "freq 0 399999": "must be from 400000 to 3400000",
    "freq 0 3400001": "must be from 400000 to 3400000",
    "freq 0 -1": "must be from",
    "freq 0 1e6": "must be from",
    "freq 0 ": "must be from",
    "freq 2 2000000": "policy 2: there is none",
    "freq ../../x 2000000": "no such request",
    "freq 0 2000000 1": "no such request",
    "governor 0 userspace": "must be one of performance, powersave",
    "governor 0 ../../../etc/shadow": "must be one of",
    "epp 0 128": "must be one of default, performance",
    "nvpmodel 3": "must be one of 0, 1, 2: others need a reboot",
    "nvpmodel 9": "must be one of 0, 1, 2",
    "nvpmodel -1": "no such request",
    "reboot": "no such request",
    "": "no such request",
    "HELLO": "no such request",
}


@pytest.mark.system
def test_what_is_on_no_list_is_refused_and_nothing_is_written(board: Path, place: Path) -> None:
    before = {file: file.read_bytes() for file in board.rglob("*") if file.is_file()}
    with helper(board, place):
        answers = asked(place, "".join(f"{line}\n" for line in REFUSED).encode()).splitlines()
        for (line, why), answer in zip(REFUSED.items(), answers, strict=True):
            assert answer.startswith(b"error "), line
            assert why in answer.decode(), line
        # The same client goes on; none of it ended the connection.
        assert asked(place, b"hello\n") == b"ok 2\n"
    assert {file: file.read_bytes() for file in board.rglob("*") if file.is_file()} == before


@pytest.mark.system
def test_what_is_no_line_ends_the_connection_and_not_the_helper(board: Path, place: Path) -> None:
    with helper(board, place):
        for junk in (b"\x00\xff\xfe\n", b"x" * 5000, b"f" * 65 + b"\n", b"hello\r\n"):
            assert asked(place, junk).endswith(b"error not a line of this protocol\n")
        assert asked(place, b"hel") == b""
        assert asked(place, b"hello\n") == b"ok 2\n"


@pytest.mark.system
def test_requests_are_limited(board: Path, place: Path) -> None:
    with helper(board, place):
        answers = asked(place, b"hello\n" * 400).splitlines()
        assert answers[:150] == [b"ok 2"] * 150
        assert b"error too many requests" in answers
        assert cpufreq_of(board, "scaling_max_freq") == ["3400000"] * 2


def test_so_many_at_once_and_so_many_a_second() -> None:
    allowance = Allowance(0.0)
    assert sum(allowance.take(0.0) for _ in range(1000)) == 200
    assert sum(allowance.take(1.0) for _ in range(1000)) == 50
    assert sum(allowance.take(1e6) for _ in range(1000)) == 200


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_whatever_the_sockets_mode(board: Path, place: Path) -> None:
    program = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.setgroups([]);"
        "os.setresgid(*3 * [int(sys.argv[2])]); os.setresuid(*3 * [int(sys.argv[3])]);"
        "s.connect(sys.argv[1]); s.sendall(b'freq 0 2000000\\n'); print(s.recv(100).decode())"
    )

    def told(gid: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-I", "-c", program, str(place), str(gid), str(OTHER_UID)]
        return subprocess.run(words, capture_output=True, text=True)

    with helper(board, place):
        assert place.stat().st_mode & 0o777 == 0o660
        assert "PermissionError" in told(OTHER_UID).stderr
        place.chmod(0o666)
        assert told(OTHER_UID).stdout.strip() == "error not allowed: not of the group"
        assert cpufreq_of(board, "scaling_max_freq") == ["3400000"] * 2
        assert told(os.getgid()).stdout.strip() == "ok 2000000", "one of the group may"


def test_who_may_ask_is_root_or_of_the_group() -> None:
    assert allowed(0, 7, 1234567)
    assert allowed(OTHER_UID, 1234567, 1234567)
    assert not allowed(OTHER_UID, 7, 1234567)
    assert not allowed(987654, 987654, 0), "no such user, and not of root's group"


@pytest.mark.system
def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    words = ["--socket", str(tmp_path / "s"), "--group", "no-such-group"]
    done = subprocess.run(
        [sys.executable, "-I", power_helper.__file__, *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "group 'no-such-group' is not there" in done.stderr


@pytest.mark.system
def test_it_needs_nothing_but_python() -> None:
    program = (
        "import sys, runpy; before = set(sys.modules); runpy.run_path(sys.argv[1]);"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] not in"
        " sys.stdlib_module_names])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, power_helper.__file__], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.system
def test_a_switch_goes_through_the_helper(board: Path, place: Path) -> None:
    library = read_library(Path("/none"), Path("/none"))
    with helper(board, place):
        for profile in ("raspberry-pi-5", SUPER):
            switch = open_switch(
                library.profile(profile), switching="auto", helper=place, sysroot=board
            )
            assert len(switch.modes) == 3
            switch.switch(switch.modes[0])
            assert switch.current() == switch.modes[0]
            switch.close()


@settings(deadline=None)  # each makes a folder
@given(st.lists(st.text(max_size=40) | st.sampled_from(sorted(REFUSED)), max_size=20))
def test_no_line_makes_it_raise_or_write_beyond_its_list(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_cpufreq(Path(folder))
        board = PowerBoard(root)
        before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for line in lines:
            answer = board.obey(line)
            assert answer.startswith(("ok ", "error "))
            assert "\n" not in answer
        assert board.restore() == ()
        assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file()} == before


@settings(deadline=None)  # each makes a folder
@given(
    what=st.sampled_from(["freq", "governor", "epp"]),
    number=st.integers(0, 3),
    value=st.integers(0, 10_000_000).map(str)
    | st.sampled_from(["performance", "powersave", "power", "default", "schedutil"]),
)
def test_what_is_written_is_on_the_list_of_that_file(what: str, number: int, value: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_cpufreq(Path(folder), 2)
        board = PowerBoard(root)
        answer = board.obey(f"{what} {number} {value}")
        names = {
            "freq": [value] if value.isdecimal() and 400_000 <= int(value) <= 3_400_000 else [],
            "governor": ["performance", "powersave"],
            "epp": ["performance", "power", "default"],
        }[what]
        assert answer.startswith("ok ") == (number < 2 and value in names)


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path / "board")
    secret = tmp_path / "secret"
    secret.write_text("3400000\n")
    file = policy_folders(root)[0] / "scaling_max_freq"
    file.unlink()
    file.symlink_to(secret)
    assert PowerBoard(root).obey("freq 0 2000000").startswith("error policy 0: freq 2000000")
    assert secret.read_text() == "3400000\n"
