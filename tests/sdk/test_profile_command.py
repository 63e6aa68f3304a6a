"""`tidegate profile`: what it prints of boards, to people and to programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from boards import BOARDS
from sensortrees import ORIN_NANO, put_battery, put_ina3221, put_pressure, put_zone

from tidegate.cli.main import main


def run(*words: str, site: Path) -> int:
    return main(
        ["profile", *words, "--overlays", str(site), "--calibration", str(site / "calibration")]
    )


def test_detect_says_which_board_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, files = next(one for one in BOARDS if one[0] == "jetson-orin-nano-8gb-super")
    where = ["--sysroot", str(files.write(tmp_path)), "--arch", files.arch]
    assert run("detect", *where, site=tmp_path / "none") == 0
    first, *reasons = capsys.readouterr().out.splitlines()
    assert first == wanted
    assert "  device tree has nvidia,p3768-0000+p3767-0005-super" in reasons
    assert run("detect", "--json", *where, site=tmp_path / "none") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["id"] == wanted
    assert found["others"] == ["jetson-orin-nano-8gb", "generic-aarch64"]


def test_show_auto_is_the_detected_board_with_its_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, files = next(one for one in BOARDS if one[0] == "raspberry-pi-5")
    where = ["--sysroot", str(files.write(tmp_path)), "--arch", files.arch]
    assert run("show", "auto", "--json", *where, site=tmp_path / "none") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == wanted
    assert "idle" not in shown["energy"]
    assert shown["energy"]["scope_map"][0]["from"] == "rail:PMIC_SUM"
    assert {one["src"]["*"] for one in shown["energy"]["point"]} <= set(shown["sources"])


def test_show_names_the_files_it_was_read_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "rk3588", site=tmp_path) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "from base.toml, generic-aarch64.toml, rk3588.toml"
    assert "hardware.cores = 8" in shown
    assert 'hardware.src.cores = "recalled"' in shown


def test_list_has_every_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json", site=tmp_path) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {wanted for wanted, _ in BOARDS}
    assert rows["jetson-agx-thor"]["power_modes"] == ["120W", "MAXN"]
    assert rows["jetson-agx-thor"]["energy_points"] == 0


def test_check_refuses_a_wrong_file_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", site=tmp_path) == 0
    assert capsys.readouterr().err == "13 profiles: good\n"
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('schema = 1\napplies_to = "rk3588"\nhue = 1\n', encoding="utf-8")
    assert run("check", str(wrong), site=tmp_path / "none") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tidegate: {wrong}: hue = 1: must be absent")


def test_a_file_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", str(tmp_path / "missing.toml"), site=tmp_path) == 1
    assert "missing.toml" in capsys.readouterr().err


def test_sensors_says_what_this_board_shows_and_what_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, files = next(one for one in BOARDS if one[0] == "jetson-orin-nano-8gb-super")
    root = files.write(tmp_path)
    where = ["--sysroot", str(root), "--arch", files.arch, "--seconds", "0.01"]
    put_ina3221(root, ORIN_NANO)
    put_battery(root)
    put_pressure(root, 0.25)
    assert run("sensors", *where, site=tmp_path / "none") == 0
    name, power, *others = capsys.readouterr().out.splitlines()
    assert name == "jetson-orin-nano-8gb-super"
    assert re.fullmatch(r"  power: \d+\.\d\d W \(module, measured\)", power)
    assert others == [
        "  rail compute: 1.50 W",
        "  rail soc: 1.25 W",
        "  battery: 50%, not plugged in, 12.50 W out of it",
        "  pressure: 25.0% of 10 s stalled for the processor",
        "  cannot be read: thermal: no zone is of type tj-thermal",
    ]


def test_sensors_leaves_open_what_no_sensor_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_zone(tmp_path, 0, "cpu-thermal", 61.0)
    words = ["raspberry-pi-5", "--json", "--sysroot", str(tmp_path), "--seconds", "0.01"]
    assert run("sensors", *words, site=tmp_path / "none") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["profile"], told["kind"], told["watts"]) == ("raspberry-pi-5", "estimated", None)
    assert (told["celsius"], told["soft_c"], told["hard_c"]) == (61.0, 80.0, 85.0)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "4000"])
def test_sensors_refuses_a_time_that_it_cannot_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    words = ["sensors", "rk3588", "--sysroot", str(tmp_path), f"--seconds={seconds}"]
    assert run(*words, site=tmp_path / "none") == 1
    assert "must be more than 0 and at most 3600" in capsys.readouterr().err
