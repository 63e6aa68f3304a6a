"""Batteries: direction from the status alone, several as one, nothing that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from sensortrees import put, put_battery, put_mains

from tidegate.edge.energy.sensors.power_supply import Batteries
from tidegate.errors import SensorError


def test_energy_and_power_are_told_in_joules_and_watts(tmp_path: Path) -> None:
    put_battery(tmp_path)
    put_mains(tmp_path, online=False)
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.share == pytest.approx(0.5)
    assert not state.plugged
    assert state.full_j == pytest.approx(180_000)
    assert state.left_j == pytest.approx(90_000)
    assert state.drawn_w == pytest.approx(12.5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("status", "drawn_w"),
    [
        ("Discharging", 12.0),
        ("Charging", -12.0),
        ("Full", 0.0),
        ("Not charging", 0.0),
        ("Unknown", None),
    ],
)
def test_the_direction_is_the_status_s_whatever_the_sign_of_the_current(
    tmp_path: Path, sign: int, status: str, drawn_w: float | None
) -> None:
    put_battery(
        tmp_path,
        status=status,
        power_now=None,
        current_now=sign * 1_000_000,
        voltage_now=12_000_000,
    )
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.drawn_w == (None if drawn_w is None else pytest.approx(drawn_w))


def test_charge_is_joules_at_the_design_s_voltage_or_the_present_one(tmp_path: Path) -> None:
    battery = put_battery(tmp_path, voltage_now=12_000_000)
    for name in ("full", "now"):
        (battery / f"energy_{name}").unlink()
    put(battery, {"charge_full": 4_000_000, "charge_now": 1_000_000})
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.share == pytest.approx(0.25)
    assert state.full_j == pytest.approx(4 * 12 * 3600)
    put(battery, {"voltage_min_design": 11_000_000})
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.full_j == pytest.approx(4 * 11 * 3600)
    assert state.left_j == pytest.approx(11 * 3600)


def test_several_batteries_are_one_and_what_one_does_not_say_is_unknown(tmp_path: Path) -> None:
    put_battery(tmp_path, energy_full=40_000_000, energy_now=40_000_000, status="Full")
    put_battery(tmp_path, name="BAT1", energy_full=20_000_000, energy_now=5_000_000)
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.share == pytest.approx(45 / 60)
    assert state.drawn_w == pytest.approx(12.5)
    assert not state.plugged
    put_battery(tmp_path, name="BAT2", energy_full=1, energy_now=1, power_now=0)
    for name in ("energy_full", "energy_now"):
        (tmp_path / "sys/class/power_supply/BAT2" / name).unlink()
    put(tmp_path / "sys/class/power_supply/BAT2", {"capacity": 30})
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.share == pytest.approx((1.0 + 0.25 + 0.3) / 3)
    assert state.full_j is None


def test_batteries_of_other_things_and_empty_bays_do_not_count(tmp_path: Path) -> None:
    put_battery(tmp_path, name="hidpp_battery_0", scope="Device")
    put_battery(tmp_path, name="BAT1", present=0)
    put_mains(tmp_path, online=True)
    assert Batteries(sysroot=tmp_path).state() is None


@pytest.mark.parametrize(
    ("online", "status", "plugged"),
    [
        (True, "Discharging", True),
        (False, "Discharging", False),
        (True, "Charging", True),
        (None, "Discharging", False),
        (None, "Full", True),
    ],
)
def test_plugged_is_what_the_supplies_say_or_else_the_status(
    tmp_path: Path, online: bool | None, status: str, plugged: bool
) -> None:
    put_battery(tmp_path, status=status)
    if online is not None:
        put_mains(tmp_path, online=online)
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.plugged is plugged


@pytest.mark.parametrize("status", ["Full", "Not charging", "Charging", "Unknown"])
def test_what_flows_without_a_plug_flows_out_whatever_the_status_still_says(
    tmp_path: Path, status: str
) -> None:
    put_battery(tmp_path, status=status)
    put_mains(tmp_path, online=False)
    batteries = Batteries(sysroot=tmp_path)
    state = batteries.state()
    assert state is not None
    assert not state.plugged
    assert state.drawn_w == pytest.approx(12.5)
    assert batteries.read().rails == {"total": pytest.approx(12.5)}


@pytest.mark.parametrize(
    ("status", "plugged"), [("Charging", True), ("Discharging", False), ("Full", False)]
)
def test_a_battery_that_is_charged_beside_an_unused_usb_port_is_plugged_in(
    tmp_path: Path, status: str, plugged: bool
) -> None:
    put_battery(tmp_path, status=status)
    port = tmp_path / "sys/class/power_supply/ucsi-source-psy-1"
    port.mkdir(parents=True)
    put(port, {"type": "USB", "online": 0})
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.plugged is plugged
    if plugged:
        assert state.drawn_w == pytest.approx(-12.5)


def test_a_battery_measures_the_machine_only_while_it_alone_gives_power(tmp_path: Path) -> None:
    put_battery(tmp_path)
    put_mains(tmp_path, online=False)
    batteries = Batteries(sysroot=tmp_path)
    assert batteries.read().rails == {"total": pytest.approx(12.5)}
    put_mains(tmp_path, online=True)
    with pytest.raises(SensorError, match="plugged in"):
        batteries.read()


def test_an_old_battery_that_holds_more_than_full_is_full(tmp_path: Path) -> None:
    put_battery(tmp_path, energy_now=51_000_000)
    state = Batteries(sysroot=tmp_path).state()
    assert state is not None
    assert state.share == 1.0


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"energy_now": 90_000_000}, "180% of a full battery"),
        ({"energy_full": 0}, "a full battery of 0 J"),
        ({"energy_full": -4}, "a full battery of"),
        ({"energy_now": -4}, "J left cannot be"),
        ({"energy_now": "half"}, "'half' is not a whole number"),
        ({"voltage_now": -1}, "-1 uV cannot be"),
        ({"energy_now": None}, "neither energy, charge nor capacity"),
        ({"energy_now": None, "capacity": 900}, "900% of a full battery"),
        ({"status": None}, "status: No such file"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, files: dict[str, object], told: str) -> None:
    battery = put_battery(tmp_path)
    for name, value in files.items():
        (battery / name).unlink(missing_ok=True)
        if value is not None:
            put(battery, {name: value})
    with pytest.raises(SensorError, match=told):
        Batteries(sysroot=tmp_path).state()
