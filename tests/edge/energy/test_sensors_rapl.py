"""RAPL: packages only, each once, over wraps, and never joules that cannot have been drawn."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sensortrees import put_rapl
from toyexecutor import VirtualClock

from tidegate.edge.energy.sensors.rapl import RaplSource
from tidegate.errors import SensorError


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def source(sysroot: Path, clock: VirtualClock, limit_w: float = 300.0) -> RaplSource:
    return RaplSource(sysroot=sysroot, limit_w=limit_w, clock=clock)


def test_only_packages_are_counted_and_all_of_them(tmp_path: Path, clock: VirtualClock) -> None:
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
    }
    for zone, name in zones.items():
        put_rapl(tmp_path, 100.0, zone=zone, name=name)
    rapl = source(tmp_path, clock)
    assert rapl.energy_j() == 0.0
    for n, (zone, name) in enumerate(zones.items()):
        put_rapl(tmp_path, 105.0 + n, zone=zone, name=name)
    clock.advance(1.0)
    assert rapl.energy_j() == pytest.approx(5.0 + 6.0)
    assert rapl.watts() == {"total": pytest.approx(11.0)}


def test_a_package_that_is_there_by_msr_and_by_mmio_is_counted_once(
    tmp_path: Path, clock: VirtualClock
) -> None:
    for zone in ("intel-rapl:0", "intel-rapl-mmio:0"):
        put_rapl(tmp_path, 100.0, zone=zone)
    rapl = source(tmp_path, clock)
    rapl.energy_j()
    put_rapl(tmp_path, 107.0)
    put_rapl(tmp_path, 190.0, zone="intel-rapl-mmio:0")
    clock.advance(1.0)
    assert rapl.energy_j() == pytest.approx(7.0)


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.floats(0.5, 200.0), min_size=1, max_size=30))
def test_joules_go_on_over_every_wrap(
    tmp_path_factory: pytest.TempPathFactory, steps: list[float]
) -> None:
    sysroot, clock, range_j, drawn_j = tmp_path_factory.mktemp("rapl"), VirtualClock(), 500.0, 470.0
    put_rapl(sysroot, drawn_j % range_j, range_j=range_j)
    rapl = source(sysroot, clock)
    rapl.energy_j()
    for step_j in steps:
        drawn_j += step_j
        put_rapl(sysroot, drawn_j % range_j, range_j=range_j)
        clock.advance(1.0)
        assert rapl.energy_j() == pytest.approx(drawn_j - 470.0, abs=1e-5 * len(steps))


def test_a_counter_that_was_set_back_is_no_wrap(tmp_path: Path, clock: VirtualClock) -> None:
    put_rapl(tmp_path, 1000.0)
    rapl = source(tmp_path, clock)
    rapl.energy_j()
    put_rapl(tmp_path, 3.0)
    clock.advance(1.0)
    with pytest.raises(SensorError, match=r"J in 1\.000 s are more than 300 W, or the counter"):
        rapl.energy_j()
    put_rapl(tmp_path, 8.0)
    clock.advance(1.0)
    assert rapl.energy_j() == 0.0
    put_rapl(tmp_path, 15.0)
    clock.advance(1.0)
    assert rapl.energy_j() == pytest.approx(7.0)


def test_a_counter_that_may_have_wrapped_unseen_is_not_guessed_at(
    tmp_path: Path, clock: VirtualClock
) -> None:
    put_rapl(tmp_path, 10.0, range_j=3000.0)
    rapl = source(tmp_path, clock)
    rapl.energy_j()
    put_rapl(tmp_path, 20.0, range_j=3000.0)
    clock.advance(11.0)
    with pytest.raises(SensorError, match="not read for 11 s, in which it may have wrapped"):
        rapl.energy_j()


def test_counters_that_stand_still_are_refused_until_they_move(
    tmp_path: Path, clock: VirtualClock
) -> None:
    put_rapl(tmp_path, 10.0)
    rapl = source(tmp_path, clock)
    rapl.energy_j()
    clock.advance(1.0)
    assert rapl.energy_j() == 0.0
    for _ in range(3):
        clock.advance(1.5)
        with pytest.raises(SensorError, match="stand still"):
            rapl.energy_j()
    put_rapl(tmp_path, 11.0)
    assert rapl.energy_j() == 0.0
    put_rapl(tmp_path, 14.0)
    clock.advance(1.0)
    assert rapl.energy_j() == pytest.approx(3.0)


def test_without_permission_it_says_how_to_get_it(
    tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = put_rapl(tmp_path, 10.0) / "energy_uj"
    deny(denied, monkeypatch)
    with pytest.raises(SensorError, match="permission denied; to let the service") as raised:
        source(tmp_path, clock).energy_j()
    assert "0440 root tidegate" in str(raised.value)


def test_of_twins_the_one_that_can_be_read_is_taken(
    tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(put_rapl(tmp_path, 10.0) / "energy_uj", monkeypatch)
    put_rapl(tmp_path, 50.0, zone="intel-rapl-mmio:0")
    rapl = source(tmp_path, clock)
    rapl.energy_j()
    put_rapl(tmp_path, 54.0, zone="intel-rapl-mmio:0")
    clock.advance(1.0)
    assert rapl.energy_j() == pytest.approx(4.0)


@pytest.mark.parametrize("text", ["", "nan", "-5", "1e9", "0x10", "7\x008", "9" * 30])
def test_what_is_no_number_of_joules_is_refused_by_name(
    tmp_path: Path, clock: VirtualClock, text: str
) -> None:
    file = put_rapl(tmp_path, 10.0) / "energy_uj"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SensorError, match="energy_uj"):
        source(tmp_path, clock).energy_j()


def deny(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no mode of a file keeps out."""
    opened = os.open

    def refusing(path: Path, flags: int) -> int:
        if path == file:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags)

    monkeypatch.setattr(os, "open", refusing)
