"""The root helper as a process: what it obeys and refuses, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from powerboards import JETSONS, cpufreq_of, write_cpufreq, write_jetson

from tidegate.edge.energy import power_helper
from tidegate.edge.energy.power_board import PowerBoard, policy_folders
from tidegate.edge.energy.power_helper import Allowance, allowed, listening, serve
from tidegate.edge.energy.power_kept import Kept
from tidegate.edge.energy.power_writes import HelperWrites
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.switches import open_switch
from tidegate.errors import ActuationError

SUPER = "jetson-orin-nano-8gb-super"
OTHER_UID = 65534
NO_GROUP = 987_654

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


PROGRAM = (
    f"import sys; sys.path.insert(0, {str(Path(power_helper.__file__).parents[3])!r});"
    "from tidegate.edge.energy.power_helper import main; sys.exit(main())"
)
"""The helper, as the command of the package, with nothing of this environment."""


def helper_words(root: Path, path: Path) -> list[str]:
    words = ["--socket", str(path), "--group", str(os.getgid()), "--sysroot", str(root)]
    return [sys.executable, "-I", "-c", PROGRAM, *words]


@contextmanager
def helper(root: Path, path: Path) -> Iterator[subprocess.Popen[str]]:
    """The helper on `root`, ended in the end as systemd ends it."""
    process = subprocess.Popen(helper_words(root, path), stderr=subprocess.PIPE, text=True, env={})
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        while "not restored" in line:
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
def test_a_second_daemon_is_told_who_has_the_helper(board: Path, place: Path) -> None:
    with helper(board, place):
        first = HelperWrites(place)
        first.ask("freq 1 1000000")
        busy = rf"busy: process {os.getpid()} of user {os.getuid()} has it"
        with pytest.raises(ActuationError, match=busy):
            HelperWrites(place)
        assert cpufreq_of(board, "scaling_max_freq")[1] == "1000000", "the first goes on"
        assert first.ask("freq 1 2000000") == "2000000"
        first.close()
        second = HelperWrites(place)
        assert second.ask("freq 1 1000000") == "1000000"
        second.close()


def test_a_client_that_never_asks_makes_room(
    board: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power_helper, "_FIRST_S", 0.1)
    with serving(board, place, os.getgid()), socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(10)
        silent.connect(str(place))
        assert silent.recv(100).startswith(b"error nothing was asked for")
        later = HelperWrites(place)
        time.sleep(0.3)
        assert later.ask("hello") == "2", "who asked once may be silent"
        later.close()


@contextmanager
def serving(root: Path, place: Path, group: int) -> Iterator[None]:
    """The helper's loop in a thread of this process, for a group that need not exist."""
    with closing(Kept(place.parent)) as kept, listening(place, os.getgid()) as listener:

        def run() -> None:
            with suppress(OSError):  # the listener is shut down
                serve(listener, PowerBoard(root, kept), group)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.system
def test_a_socket_that_a_killed_helper_left_is_replaced(board: Path, place: Path) -> None:
    with helper(board, place) as process:
        process.kill()
        process.wait(timeout=20)
        assert place.exists()
    with helper(board, place):
        assert asked(place, b"hello\n") == b"ok 2\n"


@pytest.mark.system
def test_what_a_killed_helper_left_is_restored_when_it_begins_again(
    board: Path, place: Path
) -> None:
    with helper(board, place) as process:
        writes = HelperWrites(place)
        for line in ("freq 0 2000000", "governor 1 performance", "nvpmodel 0"):
            writes.ask(line)
        process.kill()
        process.wait(timeout=20)
        assert cpufreq_of(board, "scaling_max_freq")[0] == "2000000"
    with helper(board, place):
        assert cpufreq_of(board, "scaling_max_freq") == ["3400000"] * 2
        assert cpufreq_of(board, "scaling_governor") == ["powersave"] * 2
        assert (board / "var/lib/nvpmodel/status").read_text() == "pmode:0001"
        # The daemon goes on with the new one, and what is found is still the owner's.
        with suppress(ActuationError):
            writes.ask("freq 0 400000")
        assert writes.ask("freq 0 400000") == "400000"
        writes.close()
        until(["3400000"] * 2, lambda: cpufreq_of(board, "scaling_max_freq"))
    assert not (place.parent / "found.json").exists()


@pytest.mark.system
@pytest.mark.parametrize("left", ["{", "[[1]]", '[["freq", 0, "../x"]]', '[["reboot", 0, "1"]]'])
def test_a_file_of_what_was_found_that_makes_no_sense_is_told_and_not_obeyed(
    left: str, board: Path, place: Path
) -> None:
    before = {file: file.read_bytes() for file in board.rglob("*") if file.is_file()}
    (place.parent / "found.json").write_text(left)
    with helper(board, place):
        assert asked(place, b"hello\n") == b"ok 2\n"
    assert {file: file.read_bytes() for file in board.rglob("*") if file.is_file()} == before


@pytest.mark.system
def test_a_file_that_is_in_the_sockets_place_is_left_there(board: Path, place: Path) -> None:
    place.write_text("the owner's")
    done = subprocess.run(helper_words(board, place), capture_output=True, text=True, env={})
    assert done.returncode == 2
    assert "Address already in use" in done.stderr
    assert place.read_text() == "the owner's"


@pytest.mark.system
def test_a_second_helper_leaves_the_first_its_socket(board: Path, place: Path) -> None:
    with helper(board, place):
        done = subprocess.run(helper_words(board, place), capture_output=True, text=True, env={})
        assert done.returncode == 2
        assert "another process switches power modes here" in done.stderr
        assert asked(place, b"hello\n") == b"ok 2\n"


def test_a_socket_that_somebody_listens_on_is_not_taken(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place))
        other.listen(1)
        with pytest.raises(OSError, match="another helper listens on it"):
            listening(place, os.getgid()).__enter__()
        assert place.is_socket()


def test_a_socket_that_was_put_in_the_place_of_ours_stays(place: Path) -> None:
    with listening(place, os.getgid()):
        place.unlink()
        place.write_text("another's")
    assert place.read_text() == "another's"


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
def test_a_process_that_is_not_of_the_group_is_refused(board: Path, place: Path) -> None:
    # Root's processes may always ask, so this one becomes another user's; who is not root stays.
    program = (
        f"import os, socket, sys; other = {OTHER_UID} if os.geteuid() == 0 else None\n"
        "if other: os.setgroups([]); os.setresgid(*3 * [other]); os.setresuid(*3 * [other])\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.sendall(b'freq 0 2000000\\n'); print(s.recv(100).decode())"
    )
    words = [sys.executable, "-I", "-c", program, str(place)]
    with serving(board, place, NO_GROUP):
        place.chmod(0o666)
        told = subprocess.run(words, capture_output=True, text=True)
    assert told.stdout.strip() == "error not allowed: not of the group", told.stderr
    assert cpufreq_of(board, "scaling_max_freq") == ["3400000"] * 2


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
        [sys.executable, "-I", "-c", PROGRAM, *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "group 'no-such-group' is not there" in done.stderr


@pytest.mark.system
def test_it_needs_nothing_but_python() -> None:
    program = PROGRAM.replace("sys.exit(main())", "print(*sys.modules)").replace(
        "import sys;", "import sys; before = set(sys.modules);"
    )
    program = program.replace("*sys.modules", "*(set(sys.modules) - before)")
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    found = {one for one in done.stdout.split() if one.split(".")[0] not in sys.stdlib_module_names}
    assert found == {
        "tidegate",
        "tidegate.edge",
        "tidegate.edge.energy",
        *(f"tidegate.edge.energy.power_{one}" for one in ("board", "helper", "kept")),
    }, done.stderr


@pytest.mark.system
def test_a_switch_goes_through_the_helper(board: Path, place: Path) -> None:
    library = read_library(Path("/none"), Path("/none"))
    with helper(board, place):
        for profile, modes in (("raspberry-pi-5", 3), (SUPER, 2)):
            switch = open_switch(
                library.profile(profile), switching="auto", helper=place, sysroot=board
            )
            assert len(switch.modes) == modes
            switch.switch(switch.modes[0])
            assert switch.current() == switch.modes[0]
            switch.close()


def found_board(root: Path, kept: Path) -> PowerBoard:
    """A board whose keeper's lock is gone, as each test has a folder of its own."""
    keeper = Kept(kept)
    keeper.close()
    return PowerBoard(root, keeper)


@settings(deadline=None)  # each makes a folder
@given(st.lists(st.text(max_size=40) | st.sampled_from(sorted(REFUSED)), max_size=20))
def test_no_line_makes_it_raise_or_write_beyond_its_list(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as kept:
        root = write_cpufreq(Path(folder))
        board = found_board(root, Path(kept))
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
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as kept:
        root = write_cpufreq(Path(folder), 2)
        board = found_board(root, Path(kept))
        answer = board.obey(f"{what} {number} {value}")
        names = {
            "freq": [value] if value.isdecimal() and 400_000 <= int(value) <= 3_400_000 else [],
            "governor": ["performance", "powersave"],
            "epp": ["performance", "power", "default"],
        }[what]
        assert answer.startswith("ok ") == (number < 2 and value in names)


def test_a_client_gets_no_more_than_the_owner_allowed(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path / "board")
    file = policy_folders(root)[0] / "scaling_max_freq"
    file.write_text("2000000\n")
    board = found_board(root, tmp_path)
    for _ in range(2):  # before anything is written, and after
        assert board.obey("freq 0 2000001").endswith("must be from 400000 to 2000000")
        assert board.obey("freq 0 1000000") == "ok 1000000"
    assert board.restore() == ()
    file.write_text("3000000\n")
    assert board.obey("freq 0 2000001") == "ok 2000001", "the owner raised it"


def test_a_mode_that_sets_clocks_is_left_first_and_the_owners_clock_comes_after(
    tmp_path: Path,
) -> None:
    root = write_jetson(write_cpufreq(tmp_path / "board"), JETSONS[SUPER])
    file = policy_folders(root)[0] / "scaling_max_freq"
    file.write_text("2000000\n")
    (root / "clocks").write_text(str(file))  # each mode sets them to its own highest
    board = found_board(root, tmp_path)
    assert board.obey("nvpmodel 0") == "ok 0"
    assert file.read_text().strip() == "3400000"
    assert board.restore() == ()
    assert (root / "var/lib/nvpmodel/status").read_text() == "pmode:0001"
    assert file.read_text().strip() == "2000000"


def test_what_cannot_be_restored_is_told_and_tried_again(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path / "board", 2)
    file = policy_folders(root)[0] / "scaling_max_freq"
    board = found_board(root, tmp_path)
    for policy in (0, 1):
        board.obey(f"freq {policy} 1000000")
    file.rename(file.with_suffix(".away"))
    (why,) = board.restore()
    assert "scaling_max_freq: cannot be read" in why
    assert cpufreq_of(root, "cpuinfo_max_freq") == ["3400000"] * 2
    assert (policy_folders(root)[1] / "scaling_max_freq").read_text().strip() == "3400000"
    file.with_suffix(".away").rename(file)
    later = found_board(root, tmp_path)
    assert later.recover() == ()
    assert file.read_text().strip() == "3400000"


def test_a_clock_that_is_another_after_it_was_put_back_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_cpufreq(tmp_path / "board")
    board = found_board(root, tmp_path)
    board.obey("freq 0 1000000")
    with monkeypatch.context() as patch:  # a driver that takes nothing
        patch.setattr(os, "write", lambda *_: 0)
        patch.setattr(os, "O_TRUNC", 0)
        (why,) = board.restore()
    assert why == "policy 0: freq is '1000000' after '3400000' was put back"
    assert board.restore() == ()


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    root = write_cpufreq(tmp_path / "board")
    secret = tmp_path / "secret"
    secret.write_text("3400000\n")
    file = policy_folders(root)[0] / "scaling_max_freq"
    file.unlink()
    file.symlink_to(secret)
    assert (
        found_board(root, tmp_path)
        .obey("freq 0 2000000")
        .startswith("error policy 0: freq 2000000")
    )
    assert secret.read_text() == "3400000\n"
