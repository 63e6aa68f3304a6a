"""Both ends and the broker as processes that are killed: one whole answer all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from linkbrokers import RUNTIME, BrokerProcess
from linkprocess import expected

from tidegate.link.fleet import pair

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

SUPPORT = Path(__file__).resolve().parents[1] / "support"


class Ends:
    """A broker, a gateway and a device, each its own process."""

    def __init__(self, root: Path) -> None:
        pair(root / "device", root / "gateway")
        self.root = root
        self.broker = BrokerProcess("mosquitto", root)
        self.broker.start()
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, role: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(SUPPORT / "linkprocess.py"),
                role,
                str(self.root / role),
                self.broker.url,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(RUNTIME), str(SUPPORT)))},
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(timeout=10)
            assert process.stdout is not None
            process.stdout.close()
        self.broker.kill()


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    ends = Ends(tmp_path)
    yield ends
    ends.close()


def read(process: subprocess.Popen[str], lines: int | None = None) -> list[str]:
    """The next `lines` lines, or all up to the end."""
    assert process.stdout is not None
    got: list[str] = []
    for line in process.stdout:
        got.append(line.rstrip("\n"))
        if len(got) == lines:
            break
    return got


def whole_after_asking_again(lines: list[str]) -> bool:
    """One whole answer, and the kill came before its end: the device had to ask again."""
    resends = int(lines[-1].removeprefix("resends "))
    return lines[:-1] == expected() and resends > 0


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(timeout=10)


def test_a_gateway_killed_in_mid_answer_goes_on_when_it_returns(ends: Ends) -> None:
    gateway, device = ends.start("gateway"), ends.start("device")
    got = read(device, 30)
    kill(gateway)
    ends.start("gateway")
    assert whole_after_asking_again(got + read(device))


def test_a_device_killed_in_mid_answer_finds_all_of_it_when_it_returns(ends: Ends) -> None:
    ends.start("gateway")
    device = ends.start("device")
    assert read(device, 30) == expected()[:30]
    kill(device)
    assert whole_after_asking_again(read(ends.start("device")))


def test_everything_killed_in_turn_still_gives_one_whole_answer(ends: Ends) -> None:
    gateway, device = ends.start("gateway"), ends.start("device")
    got = read(device, 20)
    kill(gateway)
    ends.broker.kill()
    ends.broker.start()
    gateway = ends.start("gateway")
    got += read(device, 30)
    assert got == expected()[:50]
    kill(device)
    kill(gateway)
    device = ends.start("device")
    ends.start("gateway")
    assert whole_after_asking_again(read(device))
