"""Whatever stands in any file of a board, a sample is made of it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sensortrees import (
    every_profile,
    panel_of,
    put_battery,
    put_mains,
    put_power,
    put_pressure,
    put_vcgencmd,
    put_zone,
)
from toyexecutor import VirtualClock

from tidegate.edge.energy.sensors.rpi_pmic import RpiPmic
from tidegate.edge.energy.sensors.sample import Sample
from tidegate.errors import SensorError

BOARDS = [one for one in every_profile() if any(two.backend != "model" for two in one.sensor.power)]

content = st.one_of(
    st.none(),
    st.binary(max_size=64),
    st.integers(-(2**70), 2**70).map(lambda number: str(number).encode()),
    st.sampled_from([b"", b"nan", b"-inf", b"1e400", b"\xff\xfe", b"Battery", b"Discharging"]),
    st.just(b"7" * 5000),
)
"""Of a file; None: it is gone."""


def plausible(before: Sample | None, sample: Sample) -> None:
    """What holds of every sample."""
    assert math.isfinite(sample.joules)
    assert math.isfinite(sample.watts)
    assert sample.watts >= 0
    assert all(0 <= watts < 1e4 for watts in sample.rails.values())
    assert len(sample.faults) == len(set(sample.faults)) < 20
    assert all("\n" not in one and len(one) < 500 for one in sample.faults)
    if sample.battery is not None:
        assert 0 <= sample.battery.share <= 1
    if before is not None and before.count == sample.count:
        assert (before.kind, before.scope) == (sample.kind, sample.scope)
        assert sample.joules >= before.joules


@pytest.mark.parametrize("board", BOARDS, ids=lambda one: one.id)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_bytes_in_any_file_make_a_sample(
    board: object, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    profile = next(one for one in BOARDS if one is board)
    sysroot, clock = tmp_path_factory.mktemp("fuzz"), VirtualClock()
    put_power(sysroot, profile, 6.0)
    put_battery(sysroot)
    put_mains(sysroot, online=False)
    put_pressure(sysroot, 0.5)
    for n, zone in enumerate(profile.sensor.thermal):
        put_zone(sysroot, n, zone.zone_type, 50.0, trip_point_0_type="hot", trip_point_0_temp=9e4)
    files = sorted(one for one in (sysroot / "sys").rglob("*") if one.is_file())
    files.append(sysroot / "proc/pressure/cpu")
    panel, before = panel_of(profile, sysroot, clock), None
    for step in range(4):
        for file in data.draw(st.lists(st.sampled_from(files), max_size=3), label=f"files {step}"):
            _write(file, data.draw(content, label=file.name))
        clock.advance(data.draw(st.sampled_from([0.0, 0.2, 1.0, 100.0])))
        panel.worked(seconds=1.0, joules=1.0)
        sample = panel.sample()
        plausible(before, sample)
        before = sample


@given(
    text=st.binary(max_size=200)
    | st.text("VDD_COREAcurent()vol0123456789=.\n ", max_size=300).map(str.encode)
)
@settings(max_examples=10, deadline=None)
def test_any_answer_of_the_pmic_program_is_watts_or_a_fault(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    sysroot = tmp_path_factory.mktemp("pmic")
    (sysroot / "answer").write_bytes(text)
    put_vcgencmd(sysroot, f"cat {sysroot / 'answer'}")
    try:
        gauged = RpiPmic(sysroot=sysroot).read()
    except SensorError:
        return
    assert all(0 <= watts < math.inf for watts in gauged.rails.values())


@pytest.mark.parametrize("place", ["folder", "link", "pipe"])
def test_what_is_no_file_is_a_fault_and_does_not_block(tmp_path: Path, place: str) -> None:
    put_zone(tmp_path, 0, "tj-thermal", 50.0)
    file = tmp_path / "sys/class/thermal/thermal_zone0/temp"
    file.unlink()
    if place == "folder":
        file.mkdir()
    elif place == "link":
        file.symlink_to(file)
    else:
        os.mkfifo(file)
    board = next(one for one in BOARDS if one.id == "jetson-orin-nano-8gb")
    sample = panel_of(board, tmp_path, VirtualClock()).sample()
    assert sample.celsius is None
    assert any(str(file) in one for one in sample.faults)


def _write(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(data)
