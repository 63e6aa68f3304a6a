"""What `tidegate doctor` says of sensors and power modes, on trees of boards' files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from powerboards import JETSONS, cpufreq_of, write_cpufreq, write_jetson
from sensortrees import ORIN_NANO, put_battery, put_ina3221, put_pressure, put_rapl, put_zone

from tidegate.cli.doctor_energy import energy_facts, switch_facts
from tidegate.cli.main import main
from tidegate.edge.energy.profile_files import read_library

NANO = "jetson-orin-nano-8gb-super"


def facts(sysroot: Path, profile: str, helper: Path | None = None) -> Mapping[str, Any]:
    return energy_facts(argparse.Namespace(profile=profile, power_helper=helper, sysroot=sysroot))


def test_a_board_whose_rails_can_be_read_shows_them_and_its_modes(tmp_path: Path) -> None:
    put_ina3221(tmp_path, ORIN_NANO)
    put_zone(tmp_path, 0, "tj-thermal", 51.5)
    put_pressure(tmp_path, 0.25)
    write_jetson(tmp_path, JETSONS[NANO])
    found = facts(tmp_path, NANO)
    assert found["joules"] == "measured: module"
    assert found["watts"] == pytest.approx(6.0)
    assert found["compute_w"] == pytest.approx(1.5)
    assert found["temperature"].startswith("51.5 C")
    assert found["processor_is_waited_for"] == "25 % of the time"
    assert found["battery"] is None
    assert found["power_tool"] == "nvpmodel"
    assert found["power_mode"] == "25W"
    assert {"15W", "25W"} <= set(found["power_modes"])
    assert "power_problem" not in found


def test_what_should_be_there_and_is_not_is_listed_one_by_one(tmp_path: Path) -> None:
    found = facts(tmp_path, NANO)
    assert found["joules"].startswith("not measured")
    assert found["watts"] is None
    assert any("ina3221" in line for line in found["cannot_be_read"])
    assert "nvpmodel" in found["power_problem"]


def test_a_counter_that_cannot_be_read_is_named_with_its_file(tmp_path: Path) -> None:
    zone = put_rapl(tmp_path, 10.0)
    (zone / "energy_uj").unlink()
    (zone / "energy_uj").mkdir()
    found = facts(tmp_path, "generic-x86-64")
    assert found["joules"].startswith("not measured")
    assert any("energy_uj" in line for line in found["cannot_be_read"])


def test_looking_at_clocks_leaves_them_as_they_are(tmp_path: Path) -> None:
    write_cpufreq(tmp_path, 2)
    before = cpufreq_of(tmp_path, "scaling_max_freq")
    found = facts(tmp_path, "intel-n100-class")
    assert found["power_tool"] == "cpufreq"
    assert found["power_modes"] == ("0.6", "0.8", "full")
    assert found["power_mode"] == "full"
    assert cpufreq_of(tmp_path, "scaling_max_freq") == before
    assert cpufreq_of(tmp_path, "energy_performance_preference") == ["balance_performance"] * 2


def test_a_battery_says_how_full_it_is_and_where_power_comes_from(tmp_path: Path) -> None:
    put_battery(tmp_path)
    found = facts(tmp_path, "ryzen-laptop")
    assert found["battery"] == "50 %, discharging, 12.5 W out of it"


def test_a_helper_that_is_not_there_is_said_by_its_socket(tmp_path: Path) -> None:
    write_cpufreq(tmp_path)
    profile = read_library().profile("intel-n100-class")
    found = switch_facts(profile, tmp_path / "power.sock", tmp_path)
    assert str(tmp_path / "power.sock") in str(found["power_problem"])


def test_files_of_one_board_and_a_helper_of_another_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["doctor", "--profile", NANO, "--sysroot", str(tmp_path)]
    assert main([*flags, "--power-helper", "/run/h"]) != 0
    assert "absent beside --sysroot" in capsys.readouterr().err
    flags[-1] = str(tmp_path / "none")
    assert main(flags) != 0
    assert "a folder that is there" in capsys.readouterr().err


def test_an_unknown_profile_is_a_line_and_no_end(tmp_path: Path) -> None:
    assert "toaster" in facts(tmp_path, "toaster")["problem"]


def test_people_and_programs_get_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["doctor", "--profile", NANO, "--sysroot", str(tmp_path)]
    assert main([*flags, "--json"]) == 0
    energy = json.loads(capsys.readouterr().out)["energy"]
    assert energy["profile"] == NANO
    assert main(flags) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in energy["cannot_be_read"]:
        assert " ".join(line.split()) in shown
    assert "cannot be read" in shown
