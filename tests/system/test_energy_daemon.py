"""A real daemon on a board of files that a script changes: battery, heat, the plug, the link.

What it decided is in a file with all that it depended on; the pure function is asked again about
each of those states, and what was done is compared with what it says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from deployment import Deployment, ask
from powerboards import cpufreq_of, write_cpufreq
from sensortrees import put_battery, put_mains, put_zone
from services import Service, Services, run_tidegate, until
from streams import chat

from tidegate.edge.energy.fitted_costs import this_device, weights_digest
from tidegate.edge.energy.governor_trace import read_decisions
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import Decision, PaceState, Weights
from tidegate.link.fleet import pair
from tidegate.model.bundle import Bundle

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

MODES = ("0.6", "0.8", "full")
COSTS = """
schema = 1
applies_to = "ryzen-laptop"

[[cost]]
model = "edge"
weights = "{weights}"
device = "{device}"
executor = "openvino"
rows = 4
threads = 1
date = "2026-11-22"
scope = "board_dc"
src = "here"
{modes}

[sources.here]
kind = "calibrated"
note = "a test's"
"""
MODE = """
[[cost.mode]]
name = "{name}"
prefill_token_s = 1e-4
step_s = {step_s}
row_s = 5e-4
prefill_w = {watts}
decode_w = {watts}
idle_w = {idle_w}
src = "here"
"""


@dataclass(frozen=True, kw_only=True)
class Board:
    """Files of a laptop."""

    root: Path

    def made(self) -> Board:
        write_cpufreq(self.root)
        self.warm(45)
        self.power(plugged=True)
        return self

    def warm(self, celsius: float) -> None:
        trips = {"trip_point_0_type": "passive", "trip_point_0_temp": 80_000}
        trips |= {"trip_point_1_type": "critical", "trip_point_1_temp": 95_000}
        put_zone(self.root, 0, "x86_pkg_temp", celsius, **trips)

    def power(self, *, plugged: bool, watts: float = 10.0) -> None:
        """2 Wh, of which 30 % are left: nothing that could last for hours."""
        put_mains(self.root, online=plugged)
        put_battery(
            self.root,
            status="Charging" if plugged else "Discharging",
            energy_full=2_000_000,
            energy_now=600_000,
            power_now=round(watts * 1e6),
        )


def calibration(bundle: Path, file: Path) -> Path:
    """Costs with so many watts that little work is much."""
    manifest = Bundle.open(bundle).manifest
    told = zip(MODES, (0.0015, 0.00125, 0.001), (160.0, 200.0, 280.0), (8.0, 8.5, 9.0), strict=True)
    modes = "".join(
        MODE.format(name=name, step_s=step, watts=watts, idle_w=idle_w)
        for name, step, watts, idle_w in told
    )
    weights = weights_digest(manifest, "openvino")
    file.write_text(COSTS.format(weights=weights, device=this_device(), modes=modes))
    return file


def energy(device: Service) -> Any:
    return device.get("/status")["energy"]


def said(words: str, tokens: int, **options: object) -> dict[str, object]:
    return chat(words, max_tokens=tokens, ignore_eos=True, temperature=0, tidegate=options)


def route(answer: Any) -> str:
    return str(answer["tidegate"]["route"])


@contextmanager
def asking(device: Service, body: dict[str, object], into: list[Any]) -> Iterator[None]:
    """A caller beside a block."""
    thread = threading.Thread(target=lambda: into.append(ask(device, body)))
    thread.start()
    yield
    thread.join(60)


def lasting(hours: int) -> str:
    """A time of day so many hours ahead."""
    return f"{datetime.now() + timedelta(hours=hours):%H:%M}"


def test_the_daemon_follows_its_board_as_the_pure_function_says(
    bundle: Path, cloud_checkpoint: Path, tmp_path: Path
) -> None:
    board = Board(root=tmp_path / "root").made()
    decisions = tmp_path / "decisions.jsonl"
    pair(tmp_path / "device", tmp_path / "gateway")
    flags = (
        *("--profile", "ryzen-laptop", "--energy-sysroot", str(board.root)),
        *("--calibration", str(calibration(bundle, tmp_path / "costs.toml"))),
        *("--energy-until", lasting(3), "--energy-price", "0.2"),
        *("--energy-decisions", str(decisions)),
    )
    with Services(tmp_path) as services:
        made = Deployment(services=services, bundle=bundle, checkpoint=cloud_checkpoint)
        made.start_broker()
        made.start_cloud()
        device = made.another_device("device", *flags)
        made.ready(device)
        _plugged_in(device)
        _unplugged(device, board, made)
        _held(device)
        _hot(device, board)
        _garbage(device, board)
        _stopped(device)
        # The board is left as it was found.
        assert cpufreq_of(board.root, "scaling_max_freq") == ["3400000"]
        log = device.log.read_text()
    assert "Traceback" not in log
    decided = list(read_decisions(decisions))
    for pace, state, decision in decided:
        assert pace.decide(state) == decision
    _done_as_decided(decided, log)


def _plugged_in(device: Service) -> None:
    assert energy(device)["plan"] is None
    answer = ask(device, said("the first words", 5))
    assert route(answer) == "edge"
    assert "predicted in mode" in answer["tidegate"]["reason"]
    # After the dwell it idles in the idlest mode; a deadline takes the fastest one at once.
    until(lambda: energy(device)["mode"] == "0.6", "the idlest mode")
    ask(device, said("hurry", 300, deadline_ms=300, route="edge"))
    assert energy(device)["mode"] == "full"


def _unplugged(device: Service, board: Board, made: Deployment) -> None:
    board.power(plugged=False)
    until(lambda: energy(device)["plan"] is not None, "a plan at once", within_s=5)
    told = energy(device)
    assert told["battery"]["share"] == pytest.approx(0.3)
    assert told["plan"]["allowed_w"] == 0  # it cannot be met: said once, and gone on with
    until(lambda: energy(device)["source"] == "measured", "the battery's watts")
    for number in range(20):
        board.power(plugged=False, watts=260)
        answer = ask(device, said(f"private work {number}", 400, privacy="local"))
        assert route(answer) == "edge"
        board.power(plugged=False)
        if energy(device)["debt_j"] > 400:
            break
    assert energy(device)["debt_j"] > 400
    answer = ask(device, said("what may leave", 50))
    assert route(answer) == "cloud"
    assert " J owed" in answer["tidegate"]["reason"]
    assert route(ask(device, said("what may not", 5, privacy="local"))) == "edge"
    made.broker.kill()
    until(lambda: not device.get("/status")["link"]["reachable"], "the link is down")
    assert route(ask(device, said("now it stays", 5))) == "edge"
    board.power(plugged=True)
    until(lambda: energy(device)["plan"] is None, "no plan", within_s=5)
    assert energy(device)["debt_j"] == 0


def _held(device: Service) -> None:
    answers: list[Any] = []
    with asking(device, said("no hurry", 20, priority="background"), answers):
        until(lambda: energy(device)["held"] == 1, "background work waits for company")
        time.sleep(0.2)  # what was held for less is not told
        assert answers == []
        ask(device, said("company", 5))
    assert ", held " in answers[0]["tidegate"]["reason"]


def _hot(device: Service, board: Board) -> None:
    board.warm(94.5)
    until(lambda: energy(device)["celsius"] == 94.5, "the reading")
    until(lambda: energy(device)["mode"] == "0.6", "the slowest mode")
    ask(device, said("hurry in the heat", 300, deadline_ms=300))
    assert energy(device)["mode"] == "0.6"
    board.warm(45)


def _garbage(device: Service, board: Board) -> None:
    for file in ("thermal/thermal_zone0/temp", "power_supply/BAT0/energy_now"):
        (board.root / "sys/class" / file).write_bytes(b"\xff\x00garbage")
    until(lambda: energy(device)["celsius"] is None, "no temperature")
    assert any("thermal" in fault for fault in energy(device)["faults"])
    assert route(ask(device, said("still here", 5))) == "edge"
    assert "tidegate_energy_joules_total" in httpx.get(f"{device.url}/metrics", timeout=10).text


def _stopped(device: Service) -> None:
    """Who is held when the daemon stops is refused at once, and does not keep it from ending."""
    refused: list[int] = []

    def wait() -> None:
        body = said("never", 20, priority="background", route="edge")
        refused.append(httpx.post(f"{device.url}/v1/chat/completions", json=body).status_code)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: energy(device)["held"] == 1, "held")
    began_s = time.monotonic()
    assert device.stop() == 0
    thread.join(10)
    assert refused == [503]
    assert time.monotonic() - began_s < 15


def _done_as_decided(decided: list[tuple[Pace, PaceState, Decision]], log: str) -> None:
    lines = log.splitlines()
    # Each change of the mode is one line, with the reason of the decision before it.
    modes = [line.partition("energy: power mode ")[2] for line in lines if "power mode " in line]
    assert len(modes) >= 3
    reasons = {(MODES[one.mode], one.reason) for _, _, one in decided}
    for line in modes:
        change, _, reason = line.partition(": ")
        assert (change.split(" -> ")[1], reason) in reasons
    # Each request begins or leaves once, and is told so once.
    starts = [name for _, _, one in decided for name in one.start]
    leaves = [name for _, _, one in decided for name in one.offload]
    assert len(set(starts + leaves)) == len(starts + leaves)
    for name in starts:
        assert sum(f"request {name}: here: " in line for line in lines) == 1
    for name in leaves:
        assert sum(f"request {name}: cloud: " in line for line in lines) == 1
    assert leaves
    assert sum("is held: background work waits for company" in line for line in lines) == 2
    assert sum("the cloud is out of reach" in line for line in lines) == 1
    assert sum("the battery cannot last until" in line for line in lines) == 1
    # A slower mode never comes before the dwell, unless heat took the faster ones away.
    states = [state for _, state, _ in decided]
    for old, new in pairwise(states):
        if new.mode < old.mode:
            capped = any(one.fastest is not None for one in (old, new))
            assert new.mode_since_s - old.mode_since_s >= Weights().dwell_s - 0.05 or capped


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--energy-until", "99:99"), "energy.until = '99:99': must be a local time"),
        (("--energy-reserve", "200%"), "energy.reserve"),
        (("--energy-decisions", "/nowhere/at/all"), "energy.decisions"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    bundle: Path, flags: tuple[str, ...], words: str
) -> None:
    listen = ("--listen", "127.0.0.1:0", "--profile", "generic-x86-64")
    done = run_tidegate("serve", str(bundle), *listen, *flags)
    assert done.returncode == 1
    (line,) = [one for one in done.stderr.splitlines() if "must be" in one]
    assert words in line
    assert "Traceback" not in done.stderr


def test_a_board_without_any_file_and_without_calibration_still_answers(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    flags = ("--profile", "jetson-orin-nano-8gb-super", "--energy-sysroot", str(tmp_path / "empty"))
    missing = ("--calibration", str(tmp_path / "missing.toml"), "--energy-until", lasting(2))
    with Services(tmp_path) as services:
        device = services.serve(bundle, *flags, *missing)
        answer = ask(device, said("hello", 5))
        assert route(answer) == "edge"
        told = energy(device)
        assert (told["tool"], told["failures"]) in (("none", 0), ("own", 0))
        assert told["faults"]
        assert device.stop() == 0
        assert "Traceback" not in device.log.read_text()
