"""Gauges of watts: rails by label, joules by trapezoids, nothing that cannot be true."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sensortrees import (
    ORIN_NANO,
    PMIC,
    pmic_text,
    put,
    put_ina3221,
    put_pmic,
    put_vcgencmd,
    renumber,
)
from toyexecutor import VirtualClock

from tidegate.edge.energy.sensors.gauge import Gauge, Gauged, GaugeSource
from tidegate.edge.energy.sensors.hwmon import HwmonPower
from tidegate.edge.energy.sensors.ina3221 import Ina3221
from tidegate.edge.energy.sensors.rpi_pmic import RpiPmic
from tidegate.edge.energy.sensors.work import WorkTally
from tidegate.errors import SensorError

RAILS = {"total": "VDD_IN", "compute": "VDD_CPU_GPU_CV", "soc": "VDD_SOC"}


class Dial:
    """A gauge that shows what it is set to."""

    name = "dial"

    def __init__(self, watts: float) -> None:
        self.watts = watts
        self.broken = False
        self.looks = 0

    def read(self) -> Gauged:
        self.looks += 1
        if self.broken:
            raise SensorError("the dial is broken")
        return Gauged(rails={"total": self.watts}, raw=(str(self.watts),))


def source(
    gauge: Gauge, clock: VirtualClock, work: WorkTally | None = None, limit_w: float = 100.0
) -> GaugeSource:
    return GaugeSource(
        gauge, scope="module", limit_w=limit_w, work=work or WorkTally(), clock=clock
    )


@given(readings=st.lists(st.tuples(st.floats(0.01, 20.0), st.floats(0.0, 90.0)), min_size=2))
def test_joules_are_the_area_below_the_readings(readings: list[tuple[float, float]]) -> None:
    clock, dial = VirtualClock(), Dial(0.0)
    gauge, area_j, before_w = source(dial, clock), 0.0, None
    for seconds, watts in readings:
        clock.advance(seconds)
        dial.watts = watts
        area_j += 0.0 if before_w is None else (before_w + watts) / 2 * seconds
        before_w = watts
        assert gauge.energy_j() == pytest.approx(area_j)


def test_what_is_drawn_while_it_could_not_be_read_is_not_counted() -> None:
    clock, dial = VirtualClock(), Dial(10.0)
    gauge = source(dial, clock)
    gauge.energy_j()
    clock.advance(1.0)
    assert gauge.energy_j() == pytest.approx(10.0)
    dial.broken = True
    clock.advance(1.0)
    with pytest.raises(SensorError, match="the dial is broken"):
        gauge.energy_j()
    dial.broken = False
    clock.advance(1.0)
    assert gauge.energy_j() == pytest.approx(10.0)
    clock.advance(1.0)
    assert gauge.energy_j() == pytest.approx(20.0)


@pytest.mark.parametrize("watts", [-0.2, 100.5, 1e9])
def test_watts_that_cannot_be_are_refused(watts: float) -> None:
    with pytest.raises(SensorError, match="must be from 0 to 100 W"):
        source(Dial(watts), VirtualClock()).energy_j()


def test_an_idle_rail_that_reads_a_little_below_zero_reads_zero() -> None:
    gauge = source(Dial(-0.04), VirtualClock())
    gauge.energy_j()
    assert gauge.watts() == {"total": 0.0}


def test_a_reading_may_stand_still_while_nothing_works_and_not_while_something_does() -> None:
    clock, dial, work = VirtualClock(), Dial(7.0), WorkTally()
    gauge = source(dial, clock, work)
    for _ in range(100):
        clock.advance(1.0)
        gauge.energy_j()
    for _ in range(29):
        clock.advance(1.0)
        work.add(seconds=1.0, joules=0.0)
        gauge.energy_j()
    work.add(seconds=1.0, joules=0.0)
    with pytest.raises(SensorError, match="stands still while the board works"):
        gauge.energy_j()
    with pytest.raises(SensorError, match="stands still"):
        gauge.energy_j()
    dial.watts = 7.1
    gauge.energy_j()


def test_watts_after_joules_are_of_the_same_reading() -> None:
    dial = Dial(3.0)
    gauge = source(dial, VirtualClock())
    gauge.energy_j()
    assert gauge.watts() == {"total": 3.0}
    assert dial.looks == 1
    dial.watts = 4.0
    assert gauge.watts() == {"total": 4.0}


def test_ina3221_rails_are_found_by_label_whatever_their_chip_and_number(tmp_path: Path) -> None:
    put_ina3221(tmp_path, {"VDD_SOC": (5.0, 0.4), "NC": (0.0, 0.0), "VDD_X_NC": (0.0, 0.0)})
    put_ina3221(
        tmp_path, {"VDD_CPU_GPU_CV": (4.9, 1.0), "VDD_IN": (5.1, 3.0)}, device="1-0041", number=1
    )
    gauge = Ina3221(sysroot=tmp_path, rails=RAILS)
    assert gauge.read().rails == {
        "total": pytest.approx(15.3),
        "compute": pytest.approx(4.9),
        "soc": pytest.approx(2.0),
    }
    assert "NC" not in gauge.labels()
    assert "VDD_X_NC" not in gauge.labels()


def test_an_ina3221_that_comes_back_under_another_number_is_found_again(tmp_path: Path) -> None:
    chip = put_ina3221(tmp_path, ORIN_NANO)
    gauge = Ina3221(sysroot=tmp_path, rails=RAILS)
    before = gauge.read()
    renumber(chip, 7)
    assert gauge.read() == before


def test_a_missing_rail_is_named_and_one_that_is_the_total_leaves_nothing(tmp_path: Path) -> None:
    put_ina3221(tmp_path, {"VDD_IN": (5.0, 1.0), "VDD_SOC": (5.0, 0.2)})
    gauged = Ina3221(sysroot=tmp_path, rails=RAILS).read()
    assert gauged.rails == {"total": pytest.approx(5.0), "soc": pytest.approx(1.0)}
    assert [one for one in gauged.faults if "VDD_CPU_GPU_CV" in one] == list(gauged.faults)
    with pytest.raises(
        SensorError, match=r"no rail is labelled VIN \(there are: VDD_IN, VDD_SOC\)"
    ):
        Ina3221(sysroot=tmp_path, rails={"total": "VIN"}).read()


def test_rails_of_which_none_is_the_whole_have_watts_and_no_joules(tmp_path: Path) -> None:
    put_ina3221(tmp_path, {"VDD_GPU_SOC": (5.0, 1.0), "VDD_CPU_CV": (5.0, 0.2)})
    rails = {"gpu_soc": "VDD_GPU_SOC", "cpu_cv": "VDD_CPU_CV"}
    gauge = source(Ina3221(sysroot=tmp_path, rails=rails), VirtualClock())
    with pytest.raises(SensorError, match="none of its rails covers the whole"):
        gauge.energy_j()
    assert gauge.watts() == {"gpu_soc": pytest.approx(5.0), "cpu_cv": pytest.approx(1.0)}


def test_without_rails_named_only_a_label_that_says_so_is_the_whole(tmp_path: Path) -> None:
    put_ina3221(tmp_path, ORIN_NANO)
    rails = Ina3221(sysroot=tmp_path).read().rails
    assert rails["total"] == pytest.approx(6.0)
    assert set(rails) == {"total", "VDD_CPU_GPU_CV", "VDD_SOC"}


def test_the_pmic_sums_rails_that_are_paired_by_name(tmp_path: Path) -> None:
    put_pmic(tmp_path)
    gauged = RpiPmic(sysroot=tmp_path).read()
    assert gauged.rails["total"] == pytest.approx(sum(volt * ampere for _, volt, ampere in PMIC))
    assert gauged.rails["VDD_CORE"] == pytest.approx(0.72 * 0.9)
    assert "EXT5V" not in gauged.rails


def test_a_pmic_sum_that_lacks_a_rail_is_none_and_one_with_more_begins_anew(
    tmp_path: Path,
) -> None:
    put_pmic(tmp_path, PMIC[1:])
    pmic = RpiPmic(sysroot=tmp_path)
    pmic.read()
    put_pmic(tmp_path)
    with pytest.raises(SensorError, match="further rails came into the sum"):
        pmic.read()
    pmic.read()
    put_pmic(tmp_path, PMIC[:-1])
    for _ in range(2):
        with pytest.raises(SensorError, match="HDMI is missing from the sum"):
            pmic.read()
    put_pmic(tmp_path)
    pmic.read()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 3", "status 3"),
        (
            "echo 'VCHI: cannot open /dev/vcio' >&2; exit 1",
            "must be in the group video, and its unit allow /dev/vcio",
        ),
        ("echo nothing of use", "VDD_CORE is missing"),
        (
            "echo 'VDD_CORE_A current(7)=1.0A'; echo 'VDD_CORE_V volt(15)=-1V'",
            "VDD_CORE is missing",
        ),
        ("head -c 3000 /dev/urandom", "VDD_CORE is missing"),
    ],
)
def test_a_pmic_program_that_fails_says_why(tmp_path: Path, script: str, told: str) -> None:
    put_vcgencmd(tmp_path, script)
    with pytest.raises(SensorError, match=told):
        RpiPmic(sysroot=tmp_path).read()


def test_a_pmic_program_that_hangs_is_waited_for_no_longer_than_allowed(tmp_path: Path) -> None:
    put_vcgencmd(tmp_path, "exec sleep 60")
    with pytest.raises(SensorError, match=r"no answer in 0\.05 s"):
        RpiPmic(sysroot=tmp_path, timeout_s=0.05).read()


def test_a_pmic_without_its_program_is_none(tmp_path: Path) -> None:
    with pytest.raises(SensorError, match="there is no such program"):
        RpiPmic(sysroot=tmp_path).read()


def test_the_pmic_text_of_the_tests_is_like_the_real_one() -> None:
    lines = pmic_text([("VDD_CORE", 0.8974594, 10.87674)]).splitlines()
    assert lines[:2] == [
        "    VDD_CORE_A current(0)=10.87674000A",
        "    VDD_CORE_V volt(8)=0.89745940V",
    ]


def test_hwmon_rails_are_named_by_label_or_chip(tmp_path: Path) -> None:
    folder = tmp_path / "sys/class/hwmon"
    put(folder / "hwmon0", {"name": "amdgpu", "power1_average": 9_000_000, "power1_label": "PPT"})
    put(folder / "hwmon1", {"name": "power_meter", "power1_average": 31_000_000})
    put(folder / "hwmon2", {"name": "ltc", "power1_input": 1, "power2_input": 2_000_000})
    rails = {"total": "power_meter", "gpu": "PPT", "other": "ltc_2"}
    gauge = HwmonPower(sysroot=tmp_path, rails=rails)
    assert gauge.read().rails == {"total": 31.0, "gpu": 9.0, "other": 2.0}
    (folder / "hwmon1").rename(folder / "hwmon9")
    (folder / "hwmon0").rename(folder / "hwmon1")
    assert gauge.read().rails == {"total": 31.0, "gpu": 9.0, "other": 2.0}
    with pytest.raises(SensorError, match="no rail is called board"):
        HwmonPower(sysroot=tmp_path, rails={"total": "board"}).read()
