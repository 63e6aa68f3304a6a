"""The panel: measured where it can be, estimated where not, and never one spliced to the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from sensortrees import (
    COSTS,
    ORIN_NANO,
    UNKNOWN,
    every_profile,
    panel_of,
    profile,
    put,
    put_battery,
    put_ina3221,
    put_mains,
    put_power,
    put_pressure,
    put_rapl,
    put_vcgencmd,
    put_zone,
    renumber,
)
from toyexecutor import VirtualClock

from tidegate.edge.energy.profile import Profile, ThermalSensor
from tidegate.edge.energy.sensors.sample import Sample, drawn_between
from tidegate.edge.energy.sensors.thermal import ThermalZones

NANO = profile("jetson-orin-nano-8gb-super")
MEASURED = [
    one
    for one in every_profile()
    if any(sensor.scope and sensor.backend != "model" for sensor in one.sensor.power)
]


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.mark.parametrize("board", MEASURED, ids=lambda one: one.id)
def test_every_board_with_sensors_measures_the_scope_that_its_profile_names(
    tmp_path: Path, clock: VirtualClock, board: Profile
) -> None:
    put_power(tmp_path, board, 6.0)
    put_mains(tmp_path, online=False)
    put_battery(tmp_path)
    for n, zone in enumerate(board.sensor.thermal):
        put_zone(tmp_path, n + 4, zone.zone_type, 51.0 + n)
    panel = panel_of(board, tmp_path, clock)
    counts = set()
    for n in range(1, 4):
        clock.advance(1.0)
        put_power(tmp_path, board, 6.0, moment_s=float(n))
        sample = panel.sample()
        assert sample.faults == ()
        assert (sample.kind, sample.scope) == ("measured", board.sensor.power[0].scope)
        assert sample.joules == pytest.approx(6.0 * n, rel=1e-3)
        assert sample.watts == pytest.approx(6.0, rel=1e-3)
        counts.add(sample.count)
    assert len(counts) == 1
    assert sample.celsius == (51.0 if board.sensor.thermal else None)


def test_boards_with_sensors_are_those_that_are_expected() -> None:
    assert {one.id for one in MEASURED} == {
        "generic-x86-64",
        "intel-n100-class",
        "ryzen-laptop",
        "raspberry-pi-5",
        "jetson-orin-nano-8gb",
        "jetson-orin-nano-8gb-super",
        "jetson-orin-nx-16gb",
        "jetson-orin-nx-16gb-super",
        "jetson-agx-thor",
    }


@pytest.mark.parametrize("name", ["generic-aarch64", "raspberry-pi-4", "rk3588"])
def test_boards_without_a_sensor_are_estimated_from_what_was_worked(
    tmp_path: Path, clock: VirtualClock, name: str
) -> None:
    panel = panel_of(profile(name), tmp_path, clock)
    clock.advance(10.0)
    panel.worked(seconds=4.0, joules=30.0)
    sample = panel.sample()
    assert (sample.kind, sample.scope) == ("estimated", COSTS.scope)
    assert sample.joules == pytest.approx(10 * COSTS.idle_w + 30.0)
    assert sample.watts == pytest.approx(5.0)
    assert [one for one in sample.faults if not one.startswith("thermal")] == []


def test_parts_of_a_board_are_shown_and_never_summed_to_a_whole(
    tmp_path: Path, clock: VirtualClock
) -> None:
    board = profile("jetson-agx-orin-64gb")
    put_power(tmp_path, board, 20.0)
    put_zone(tmp_path, 0, "tj-thermal", 44.0)
    panel = panel_of(board, tmp_path, clock)
    clock.advance(1.0)
    sample = panel.sample()
    assert sample.kind == "estimated"
    assert sample.joules == pytest.approx(COSTS.idle_w)
    assert set(sample.rails) == {"gpu_soc", "cpu_cv", "sys_5v"}
    assert sample.faults == ()


def test_costs_that_know_no_watts_claim_no_joules(tmp_path: Path, clock: VirtualClock) -> None:
    panel = panel_of(profile("generic-aarch64"), tmp_path, clock, UNKNOWN)
    clock.advance(100.0)
    sample = panel.sample()
    assert (sample.scope, sample.joules, sample.watts) == ("unknown", 0.0, 0.0)


def test_a_sensor_that_goes_is_told_once_and_one_that_comes_back_begins_a_new_count(
    tmp_path: Path, clock: VirtualClock
) -> None:
    chip = put_ina3221(tmp_path, ORIN_NANO)
    put_zone(tmp_path, 0, "tj-thermal", 50.0)
    panel = panel_of(NANO, tmp_path, clock)
    clock.advance(1.0)
    measured = panel.sample()
    assert measured.kind == "measured"
    assert measured.joules == pytest.approx(6.0)
    hidden = chip.rename(tmp_path / "unplugged")
    lost = []
    for _ in range(100):
        clock.advance(1.0)
        lost.append(panel.sample())
    assert {one.kind for one in lost} == {"estimated"}
    assert {len(one.faults) for one in lost} == {1}
    assert "ina3221: " in lost[0].faults[0]
    assert "there is no such chip" in lost[0].faults[0]
    assert lost[0].joules == pytest.approx(COSTS.idle_w)
    assert lost[-1].joules == pytest.approx(100 * COSTS.idle_w)
    assert {one.count for one in lost} == {measured.count + 1}
    assert drawn_between(measured, lost[0]) is None
    back = renumber(hidden, 9)
    back.rename(chip.with_name("hwmon9"))
    clock.advance(40.0)
    armed = panel.sample()
    assert armed.kind == "estimated"
    assert armed.faults == ("ina3221: can be read, and is counted from now on",)
    clock.advance(2.0)
    again = panel.sample()
    assert (again.kind, again.faults) == ("measured", ())
    assert again.joules == pytest.approx(12.0)
    assert again.count == measured.count + 2
    clock.advance(1.0)
    assert drawn_between(again, panel.sample()) == pytest.approx(6.0)


def test_the_next_sensor_is_taken_before_any_estimate(tmp_path: Path, clock: VirtualClock) -> None:
    board = profile("ryzen-laptop")
    put_mains(tmp_path, online=False)
    put_battery(tmp_path)
    put_zone(tmp_path, 0, "x86_pkg_temp", 50.0)
    panel = panel_of(board, tmp_path, clock)
    clock.advance(1.0)
    sample = panel.sample()
    assert (sample.kind, sample.scope, sample.joules) == ("measured", "board_dc", 12.5)
    assert len(sample.faults) == 1
    assert sample.faults[0].startswith("rapl: ")
    put_mains(tmp_path, online=True)
    clock.advance(1.0)
    sample = panel.sample()
    assert sample.kind == "estimated"
    assert "power_supply: plugged in: the battery does not tell what is drawn" in sample.faults


def test_a_sensor_that_was_not_read_for_a_while_begins_its_count_anew(
    tmp_path: Path, clock: VirtualClock
) -> None:
    put_mains(tmp_path, online=False)
    put_battery(tmp_path)
    counter, seconds = put_rapl(tmp_path, 100.0), 0
    panel = panel_of(profile("ryzen-laptop"), tmp_path, clock)

    def look() -> Sample:
        nonlocal seconds
        seconds += 1
        clock.advance(1.0)
        if counter.exists():
            put_rapl(tmp_path, 100.0 + 5.0 * seconds)
        return panel.sample()

    assert look().scope == "package"
    away = counter.rename(tmp_path / "away")
    assert [look().scope for _ in range(2)] == ["module", "board_dc"]
    away.rename(counter)
    assert [look().scope for _ in range(8)][-1] == "package"
    counter.rename(away)
    assert look().kind == "estimated"
    sample = look()
    assert (sample.scope, sample.joules) == ("board_dc", 12.5)


def test_of_several_zones_the_one_nearest_to_its_own_limit_counts(tmp_path: Path) -> None:
    put_zone(tmp_path, 0, "cpu", 80.0)
    put_zone(tmp_path, 1, "modem", 70.0)
    put_zone(tmp_path, 2, "case", 90.0)
    sensors = (
        ThermalSensor(zone_type="cpu", hard_c=105.0),
        ThermalSensor(zone_type="modem", soft_c=75.0),
        ThermalSensor(zone_type="case"),
    )
    warmth, faults = ThermalZones(sysroot=tmp_path, sensors=sensors).read()
    assert warmth is not None
    assert (warmth.celsius, warmth.soft_c, warmth.hard_c) == (70.0, 75.0, None)
    assert faults == ()


def test_what_the_machine_has_besides_is_found_and_is_no_fault_where_it_is_not(
    tmp_path: Path, clock: VirtualClock
) -> None:
    board = profile("rk3588")
    panel = panel_of(board, tmp_path, clock)
    clock.advance(1.0)
    assert panel.sample().faults == ()
    meter = {"name": "power_meter", "power1_average": 9_000_000}
    put(tmp_path / "sys/class/hwmon/hwmon5", meter)
    clock.advance(60.0)
    panel.sample()
    clock.advance(1.0)
    sample = panel.sample()
    assert (sample.kind, sample.scope, sample.watts) == ("measured", "platform", 9.0)


def test_watts_beyond_ten_times_what_the_board_ever_drew_are_garbage(
    tmp_path: Path, clock: VirtualClock
) -> None:
    put_ina3221(tmp_path, {**ORIN_NANO, "VDD_IN": (5.0, 43.0)})
    panel = panel_of(NANO, tmp_path, clock)
    clock.advance(1.0)
    sample = panel.sample()
    assert sample.kind == "estimated"
    assert "ina3221: total = 215 W: must be from 0 to 211 W" in sample.faults


def test_a_program_that_hangs_does_not_hold_up_every_sample(
    tmp_path: Path, clock: VirtualClock
) -> None:
    ran = tmp_path / "ran"
    put_vcgencmd(tmp_path, f"echo >> {ran}; exit 1")
    panel = panel_of(profile("raspberry-pi-5"), tmp_path, clock)
    for _ in range(300):
        clock.advance(0.2)
        assert any("status 1" in one for one in panel.sample().faults)
    assert ran.read_text(encoding="utf-8").count("\n") <= 9


def test_the_zone_nearest_to_its_limit_is_shown_with_its_limits(
    tmp_path: Path, clock: VirtualClock
) -> None:
    put_zone(tmp_path, 1, "acpitz", 99.0)
    trips = {
        "trip_point_0_type": "critical",
        "trip_point_0_temp": 105_000,
        "trip_point_1_type": "passive",
        "trip_point_1_temp": 95_000,
        "trip_point_2_type": "hot",
        "trip_point_2_temp": -274_000,
    }
    put_zone(tmp_path, 7, "x86_pkg_temp", 71.5, **trips)
    panel = panel_of(profile("generic-x86-64"), tmp_path, clock)
    sample = panel.sample()
    assert (sample.celsius, sample.soft_c, sample.hard_c) == (71.5, 95.0, 105.0)
    put_zone(tmp_path, 7, "x86_pkg_temp", 400.0)
    sample = panel.sample()
    assert sample.celsius is None
    assert any("400 C cannot be" in one for one in sample.faults)


def test_a_processor_without_the_profile_s_zone_is_read_from_its_chip(
    tmp_path: Path, clock: VirtualClock
) -> None:
    put_zone(tmp_path, 0, "acpitz", 20.0)
    hwmon = tmp_path / "sys/class/hwmon"
    put(hwmon / "hwmon0", {"name": "nvme", "temp1_input": 70_000})
    put(hwmon / "hwmon4", {"name": "k10temp", "temp1_input": 55_250, "temp1_crit": 105_000})
    sample = panel_of(profile("ryzen-laptop"), tmp_path, clock).sample()
    assert (sample.celsius, sample.soft_c, sample.hard_c) == (55.25, None, 105.0)
    assert not any("thermal" in one for one in sample.faults)
    put(hwmon / "hwmon4", {"temp1_input": "hot"})
    sample = panel_of(profile("ryzen-laptop"), tmp_path, clock).sample()
    assert sample.celsius is None
    told = [one for one in sample.faults if one.startswith("thermal: ")]
    assert len(told) == 2
    assert "no zone is of type x86_pkg_temp" in told[0]
    assert "'hot' is not a whole number" in told[1]


def test_a_fault_keeps_its_words_while_its_numbers_change(
    tmp_path: Path, clock: VirtualClock
) -> None:
    panel = panel_of(profile("raspberry-pi-5"), tmp_path, clock)
    told = set[str]()
    for n in range(50):
        put_zone(tmp_path, 0, "cpu-thermal", 400.0 + n)
        told.update(one for one in panel.sample().faults if " C cannot be" in one)
    assert [one.endswith("temp: 400 C cannot be") for one in told] == [True]
    put_zone(tmp_path, 1, "cpu-thermal", 400.0)
    assert sum(" C cannot be" in one for one in panel.sample().faults) == 2
    for number in (0, 1):
        put_zone(tmp_path, number, "cpu-thermal", 40.0)
    assert not any(" C cannot be" in one for one in panel.sample().faults)
    put_zone(tmp_path, 0, "cpu-thermal", 999.0)
    assert any("999 C cannot be" in one for one in panel.sample().faults)


def test_limits_of_the_profile_stand_before_the_kernel_s(
    tmp_path: Path, clock: VirtualClock
) -> None:
    trips = {"trip_point_0_type": "critical", "trip_point_0_temp": 110_000}
    put_zone(tmp_path, 0, "cpu-thermal", 60.0, **trips)
    sample = panel_of(profile("raspberry-pi-5"), tmp_path, clock).sample()
    assert (sample.celsius, sample.soft_c, sample.hard_c) == (60.0, 80.0, 85.0)


def test_pressure_is_a_share_and_its_absence_no_fault(tmp_path: Path, clock: VirtualClock) -> None:
    panel = panel_of(profile("rk3588"), tmp_path, clock)
    assert (panel.sample().stalled_share, panel.sample().faults) == (None, ())
    put_pressure(tmp_path, 0.125)
    assert panel.sample().stalled_share == pytest.approx(0.125)
    put(tmp_path / "proc/pressure", {"cpu": "some avg10=250.00 avg60=0"})
    sample = panel.sample()
    assert sample.stalled_share is None
    assert [one for one in sample.faults if one.startswith("pressure: ")] == list(sample.faults)


def test_a_battery_that_a_profile_names_is_missed(tmp_path: Path, clock: VirtualClock) -> None:
    panel = panel_of(profile("ryzen-laptop"), tmp_path, clock)
    assert "battery: the profile has one, and none is there" in panel.sample().faults
    put_battery(tmp_path)
    battery = panel.sample().battery
    assert battery is not None
    assert battery.share == pytest.approx(0.5)


def test_samples_at_the_same_moment_are_the_same(tmp_path: Path, clock: VirtualClock) -> None:
    put_ina3221(tmp_path, ORIN_NANO)
    panel = panel_of(NANO, tmp_path, clock)
    clock.advance(1.0)
    assert panel.sample() == panel.sample()


def test_a_counter_is_counted_from_the_opening_of_the_panel(
    tmp_path: Path, clock: VirtualClock
) -> None:
    put_rapl(tmp_path, 100.0)
    panel = panel_of(profile("generic-x86-64"), tmp_path, clock)
    put_rapl(tmp_path, 130.0)
    clock.advance(2.0)
    sample = panel.sample()
    assert sample.joules == pytest.approx(30.0)
    assert sample.watts == pytest.approx(15.0)
