"""Flags of `tidegate serve` for energy: what they become, and which are refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tidegate.cli.board import read_profile
from tidegate.cli.energy_flags import add_energy, read_energy
from tidegate.edge.energy.settings import EnergySettings
from tidegate.errors import ConfigError


def read(*flags: str, profile: str | None = "ryzen-laptop") -> EnergySettings | None:
    parser = argparse.ArgumentParser()
    add_energy(parser)
    args = parser.parse_args(flags)
    return read_energy(args, None if profile is None else read_profile(profile))


def test_a_profile_turns_scheduling_by_energy_on_and_off_leaves_it_off() -> None:
    assert read(profile=None) is None
    assert read("--energy", "off") is None
    for plain in (read(), read("--energy", "on")):
        assert plain is not None
        assert (plain.profile.id, plain.switching) == ("ryzen-laptop", "auto")
        assert (plain.reserve_share, plain.until, plain.quiet) == (0.2, None, None)
        assert plain.sysroot == Path("/")


def test_every_flag_takes_effect(tmp_path: Path) -> None:
    read_in = read(
        *("--energy-reserve", "35%", "--energy-until", "18:30", "--energy-price", "2.5"),
        *("--quiet-hours", "22:00-07:00", "--calibration", "c.toml"),
        *("--power-switching", "off", "--power-helper", "/run/h", "--energy-decisions", "d"),
    )
    assert read_in is not None
    assert (read_in.reserve_share, read_in.until, read_in.joule_price) == (0.35, "18:30", 2.5)
    assert read_in.quiet == ("22:00", "07:00")
    assert (read_in.calibration, read_in.helper) == (Path("c.toml"), Path("/run/h"))
    assert (read_in.switching, read_in.decisions) == ("off", Path("d"))
    trial = read("--energy-sysroot", str(tmp_path), "--power-switching", "all")
    assert trial is not None
    assert (trial.sysroot, trial.switching) == (tmp_path, "all")


def test_files_of_one_board_and_a_helper_of_another_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent beside --energy-sysroot"):
        read("--energy-sysroot", str(tmp_path), "--power-helper", "/run/h")
    with pytest.raises(ConfigError, match="a folder that is there"):
        read("--energy-sysroot", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--energy-reserve", "much"), "a percentage such as 20%"),
        (("--energy-reserve", "100%"), "from 0 to below 1"),
        (("--energy-reserve", "nan"), "from 0 to below 1"),
        (("--energy-until", "25:00"), "a local time as HH:MM"),
        (("--energy-until", "tomorrow"), "a local time as HH:MM"),
        (("--quiet-hours", "22:00"), "HH:MM-HH:MM"),
        (("--quiet-hours", "22:00-22:00"), "two different times"),
        (("--quiet-hours", "22:00-7"), "a local time as HH:MM"),
        (("--energy-price", "nan"), "0 or more, and finite"),
    ],
)
def test_what_cannot_be_is_refused_with_what_may_be(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(*flags)
    assert said in str(refused.value)


def test_what_needs_a_profile_says_so() -> None:
    for flags in (("--energy", "on"), ("--energy-until", "18:00"), ("--power-switching", "off")):
        with pytest.raises(ConfigError, match=f"set together with {flags[0]}"):
            read(*flags, profile=None)
    with pytest.raises(ConfigError, match="auto or on beside --quiet-hours"):
        read("--energy", "off", "--quiet-hours", "22:00-07:00")
