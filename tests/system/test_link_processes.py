"""Both ends and the broker as processes that are killed: one whole answer all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from chaosplan import Faults
from chaosproxy import chaos
from linkbrokers import RUNTIME, BrokerProcess
from linkprocess import expected
from paho.mqtt.enums import CallbackAPIVersion

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
        self.url = self.broker.url
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, role: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(SUPPORT / "linkprocess.py"),
                role,
                str(self.root / role),
                self.url,
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


def test_kills_and_a_treacherous_network_still_give_one_whole_answer(ends: Ends) -> None:
    faults = Faults(drop=0.05, duplicate=0.1, reorder=0.1, corrupt=0.02, cut=0.005)
    with chaos(ends.broker.port, seed=5, faults=faults) as proxy:
        ends.url = proxy.url
        gateway, device = ends.start("gateway"), ends.start("device")
        got = read(device, 30)
        kill(gateway)
        ends.start("gateway")
        ends.broker.kill()
        ends.broker.start()
        assert whole_after_asking_again(got + read(device))
        assert proxy.deeds.dropped
        assert proxy.deeds.duplicated
        assert proxy.deeds.reordered


def benchmark(name: str, *arguments: str) -> Any:
    """Results of a program in `benchmarks/link`."""
    script = SUPPORT.parents[1] / "benchmarks" / "link" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["results"]


def test_a_recorded_session_shows_times_and_sizes_and_no_word_of_it() -> None:
    results = benchmark("capture")
    assert results["leaked"] == []
    kinds = results["seen"]["kinds"]
    assert set(kinds) == {"advert", "request", "response", "control"}
    assert results["seen"]["requests"] == 2
    assert all(kinds[kind]["count"] > 1 for kind in ("request", "response", "control"))
    assert len(kinds["control"]["sizes_bytes"]) == 1, "an acknowledgement looks like a cancel"
    assert len(kinds["request"]["sizes_bytes"]) == 1


def test_many_requests_and_kills_are_counted_beside_a_plain_client(tmp_path: Path) -> None:
    plan = (
        "--requests",
        "30",
        "--kills",
        "3",
        "--waits",
        "fast",
        "--patience-s",
        "4",
        "--calm",
        "10",
    )
    ways = ("--ways", "sealed", "qos1", "--work", str(tmp_path / "work"))
    sealed, plain = benchmark("kills", *plan, *ways)["ways"]
    assert sealed["tally"]["answered_once"] + sealed["tally"]["failed"] == 30
    assert sealed["kills"] == 3
    assert plain["kills"] >= 1, "the last ones are left out when nothing is under way any more"
    assert plain["tally"]["submitted"] == 30
    assert plain["tally"]["lost"] > 0, "the schedule is one that loses messages"
    assert sealed["sent_over_needed"] > 1


def plain_client(port: int, name: str) -> paho.Client:
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    client.reconnect_delay_set(1, 1)
    client.connect("127.0.0.1", port)
    return client


@pytest.mark.parametrize("qos", [1, 2])
def test_plain_clients_keep_their_handshakes_whatever_is_repeated_and_reordered(
    ends: Ends, qos: int
) -> None:
    heard: Counter[bytes] = Counter()
    sent = [b"message %d" % number for number in range(400)]
    with chaos(ends.broker.port, seed=7, faults=Faults(duplicate=0.2, reorder=0.2)) as proxy:
        listener, speaker = (plain_client(proxy.port, name) for name in ("listener", "speaker"))
        listener.on_message = lambda client, userdata, message: heard.update(
            (bytes(message.payload),)
        )
        for client in (listener, speaker):
            client.loop_start()
        listener.subscribe("t", qos)
        time.sleep(0.3)
        handed = [speaker.publish("t", payload, qos=qos) for payload in sent]
        for info in handed:
            info.wait_for_publish(20)
        until_s = time.monotonic() + 20
        while len(heard) < len(sent) and time.monotonic() < until_s:
            time.sleep(0.02)
        time.sleep(0.3)
        for client in (listener, speaker):
            client.disconnect()
            client.loop_stop()
    assert set(heard) == set(sent)
    assert proxy.deeds.duplicated > 0
    if qos == 2:
        assert set(heard.values()) == {1}, "QoS 2 knows a repetition by its id"
    else:
        assert max(heard.values()) > 1
