"""Profiles are read, inherited and overlaid; whatever is wrong is one error of file and key."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError
from importlib import resources
from pathlib import Path
from typing import get_args

import pytest

from tidegate.converters.recipe_file import preset_names
from tidegate.edge.energy.profile import Profile, Runtime
from tidegate.edge.energy.profile_decode import hints_of
from tidegate.edge.energy.profile_files import Library, read_library, with_files
from tidegate.edge.energy.profile_schema import profile_schema
from tidegate.edge.executors.onnx_providers import ProviderName
from tidegate.errors import ConfigError

WANTED = (
    *("generic-aarch64", "generic-x86-64", "intel-n100-class", "jetson-agx-orin-64gb"),
    *("jetson-agx-thor", "jetson-orin-nano-8gb", "jetson-orin-nano-8gb-super"),
    *("jetson-orin-nx-16gb", "jetson-orin-nx-16gb-super", "raspberry-pi-4", "raspberry-pi-5"),
    *("rk3588", "ryzen-laptop"),
)
MINE = """
schema = 1
id = "mine"
title = "Mine"
extends = "raspberry-pi-5"
"""
OVER = 'schema = 1\napplies_to = "raspberry-pi-5"\n'
SOURCE = '[sources.meter]\nkind = "measured"\nnote = "my meter"\n'


def read(folder: Path, **files: str) -> Library:
    """The library with a site's `files` and no calibration."""
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return read_library(folder, folder / "none")


def test_all_boards_come_along_and_are_good(tmp_path: Path) -> None:
    assert tuple(one.id for one in read(tmp_path).every()) == WANTED


def test_a_profile_cannot_be_changed(tmp_path: Path) -> None:
    profile = read(tmp_path).profile("rk3588")
    with pytest.raises(FrozenInstanceError):
        profile.title = "other"  # type: ignore[misc]


def test_what_nobody_measured_is_empty(tmp_path: Path) -> None:
    library = read(tmp_path)
    assert library.profile("raspberry-pi-5").energy.idle == ()
    for board in ("rk3588", "jetson-agx-orin-64gb", "jetson-agx-thor", "jetson-orin-nano-8gb"):
        points = library.profile(board).energy.point
        assert [point for point in points if point.active_w is not None] == []


def test_the_knee_of_the_super_is_the_mode_of_least_joules_per_token(tmp_path: Path) -> None:
    profile = read(tmp_path).profile("jetson-orin-nano-8gb-super")
    runs = [one for one in profile.energy.point if one.model == "llama-3.2-1b" and one.active_w]
    least = min(runs, key=lambda one: (one.active_w or 0) / (one.decode_tok_s or 1))
    assert [mode.name for mode in profile.power.mode if mode.knee] == [least.mode]


def test_recipes_and_providers_are_those_that_exist(tmp_path: Path) -> None:
    (names, _) = get_args(hints_of(Runtime)["providers"])
    assert get_args(names) == get_args(ProviderName)
    for profile in read(tmp_path).every():
        assert profile.runtime.recipe in preset_names()


def test_a_profile_takes_what_it_does_not_say_from_the_one_it_extends(tmp_path: Path) -> None:
    text = MINE + '[runtime]\nthreads = 2\nsrc = "meter"\n' + SOURCE
    library = read(tmp_path, mine=text)
    mine, pi = library.profile("mine"), library.profile("raspberry-pi-5")
    assert (mine.runtime.threads, mine.runtime.rows) == (2, pi.runtime.rows)
    assert mine.runtime.src == {**pi.runtime.src, "threads": "meter"}
    assert mine.energy == pi.energy
    assert mine.detect is None
    assert mine.title == "Mine"


def test_overlays_lay_over_in_the_order_of_their_names_and_calibration_is_last(
    tmp_path: Path,
) -> None:
    def idle(watts: float) -> str:
        return f'[[energy.idle]]\nw = {watts}\nscope = "wall"\nsrc = "meter"\n' + SOURCE

    calibration = tmp_path / "calibration"
    record = '[calibration]\ndate = "2026-11-21"\nr2 = 0.99\nresidual = 0.03\nsrc = "meter"\n'
    calibration.write_text(OVER + 'status = "verified"\n' + idle(2.9) + record, encoding="utf-8")
    site = tmp_path / "profile.d"
    site.mkdir()
    (site / "10-a.toml").write_text(OVER + idle(3.1), encoding="utf-8")
    (site / "20-b.toml").write_text(OVER + idle(3.0), encoding="utf-8")
    overlaid = read_library(site, tmp_path / "none")
    assert [one.w for one in overlaid.profile("raspberry-pi-5").energy.idle] == [3.0]
    library = read_library(site, calibration)
    measured = library.profile("raspberry-pi-5")
    assert [one.w for one in measured.energy.idle] == [2.9]
    assert measured.status == "verified"
    assert library.profile("raspberry-pi-4").energy.idle == ()
    assert library.files_of("raspberry-pi-5")[-3:] == (
        str(site / "10-a.toml"),
        str(site / "20-b.toml"),
        str(calibration),
    )


def test_a_calibration_says_only_what_was_measured(tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.toml"
    calibration.write_text(OVER + "[service]\nwatchdog_s = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"calibration\.toml: service"):
        read_library(tmp_path / "none", calibration)


WATTS = '[[energy.idle]]\nw = 3.0\nscope = "wall"\n'
COST = (
    '[[cost]]\nmodel = "m"\nweights = "0f"\nexecutor = "onnx"\nrows = 4\ndate = "2026-11-22"\n'
    'src = "recalled"\n'
)
FITTED_MODE = (
    '[[cost.mode]]\nname = "as it is"\nprefill_token_s = 0.01\nstep_s = 0.1\nsrc = "recalled"\n'
)
MISTAKES = {
    "an unknown key": ('hue = "red"\n', "hue", "must be absent; known are"),
    "an unknown key in a table": ("[runtime]\nspeed = 2\n", "runtime.speed", "must be absent"),
    "a mistyped key": ('[runtime]\nthreads = "two"\n', "runtime.threads", "a whole number"),
    "a number that is not finite": (
        WATTS.replace("3.0", "nan"),
        "energy.idle[0].w",
        "a finite number",
    ),
    "a negative number": (WATTS.replace("3.0", "-3"), "energy.idle[0].w", "at least 0"),
    "a missing source": (WATTS, "energy.idle[0].w", "src is missing"),
    "a number that overrides and names no source": (
        "[runtime]\nthreads = 2\n",
        "runtime.threads",
        "src is missing",
    ),
    "a source that is not listed": (WATTS + 'src = "x"\n', "energy.idle[0].src", "in [sources]"),
    "a missing scope": (
        '[[energy.idle]]\nw = 3.0\nsrc = "recalled"\n',
        "energy.idle[0].scope",
        "given",
    ),
    "an unknown scope": (
        WATTS.replace("wall", "all") + 'src = "recalled"\n',
        "energy.idle[0].scope",
        "rail:LABEL",
    ),
    "a run with watts and no scope": (
        '[[energy.point]]\nmodel = "m"\nquant = "q"\nruntime = "r"\nactive_w = 3\n'
        'src = "recalled"\n',
        "energy.point[0].scope",
        "what active_w covers",
    ),
    "two knees": (
        '[[power.mode]]\nname = "a"\nknee = true\nsrc = "recalled"\n'
        '[[power.mode]]\nname = "b"\nknee = true\nsrc = "recalled"\n',
        "power.mode",
        "one mode with knee",
    ),
    "a knee without a source": (
        '[[power.mode]]\nname = "a"\nknee = true\n',
        "power.mode[0].knee",
        "src is missing",
    ),
    "a mode named twice": (
        '[[power.mode]]\nname = "a"\n[[power.mode]]\nname = "a"\n',
        "power.mode",
        "named once",
    ),
    "a measurement in an unknown mode": (
        WATTS + 'mode = "turbo"\nsrc = "recalled"\n',
        "energy.idle[0].mode",
        "a power mode",
    ),
    "a numbered hwmon path": (
        '[[sensor.power]]\nbackend = "hwmon"\nglob = "/sys/class/hwmon/hwmon3"\n',
        "sensor.power[0].glob",
        "change at every boot",
    ),
    "a relative path": (
        '[[sensor.power]]\nbackend = "hwmon"\nglob = "sys/class/hwmon/*"\n',
        "sensor.power[0].glob",
        "from the root",
    ),
    "a total that covers nobody knows what": (
        '[[sensor.power]]\nbackend = "rapl"\nrails = { total = "package-0" }\n',
        "sensor.power[0].scope",
        "what the rail total covers",
    ),
    "a soft limit above the hard one": (
        '[[sensor.thermal]]\nzone_type = "z"\nsoft_c = 90\nhard_c = 85\nsrc = "recalled"\n',
        "sensor.thermal[0].soft_c",
        "below hard_c",
    ),
    "verified without a calibration": ('status = "verified"\n', "status", "no [calibration]"),
    "no threads": ('[runtime]\nthreads = 0\nsrc = "chosen"\n', "runtime.threads", "at least 1"),
    "more memory than there is": (
        '[service]\nmemory_max = "120%"\n',
        "service.memory_max",
        "from 1% to 100%",
    ),
    "a table that is none": ('runtime = "fast"\n', "runtime", "a table"),
    "fitted costs without a mode": (
        COST + "mode = []\n",
        "cost[0].mode",
        "at least one power mode",
    ),
    "fitted costs of no rows": (
        COST.replace("rows = 4", "rows = 0") + FITTED_MODE,
        "cost[0].rows",
        "at least 1",
    ),
    "a fitted step of no time": (
        COST + FITTED_MODE.replace("step_s = 0.1", "step_s = 0"),
        "cost[0].mode",
        "more than 0 s",
    ),
    "some watts of a fitted mode": (
        COST + FITTED_MODE + "idle_w = 3.0\n",
        "cost[0].mode[0]",
        "or none of them",
    ),
    "fitted watts that cover nobody knows what": (
        COST + FITTED_MODE + "idle_w = 3.0\nprefill_w = 5.0\ndecode_w = 4.0\n",
        "cost[0].scope",
        "what the watts cover",
    ),
    "a fitted number without a source": (
        COST + FITTED_MODE.replace('src = "recalled"\n', ""),
        "cost[0].mode[0].prefill_token_s",
        "src is missing",
    ),
    "a detection of an odd span": (
        '[detect]\nscore = 1\nmem_mib = [2, 1]\nsrc = "chosen"\n',
        "detect.mem_mib",
        "[least, most]",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_error_that_names_file_and_key(what: str, tmp_path: Path) -> None:
    text, key, allowed = MISTAKES[what]
    library = read(tmp_path, wrong=OVER + text)
    with pytest.raises(ConfigError) as caught:
        library.profile("raspberry-pi-5")
    start = f"{tmp_path / 'wrong.toml'}: {key} = "
    assert str(caught.value).startswith(start), caught.value
    assert allowed in str(caught.value)


def test_a_mistake_in_one_file_leaves_other_profiles_readable(tmp_path: Path) -> None:
    library = read(tmp_path, wrong=OVER + "hue = 1\n")
    assert library.profile("raspberry-pi-4").id == "raspberry-pi-4"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINE.replace("mine", "rk3588", 1), "rk3588.toml has it"),
        (MINE.replace("raspberry-pi-5", "nothing"), "extends = 'nothing': must be a profile"),
        (MINE.replace("raspberry-pi-5", "mine"), "no circle (mine -> mine)"),
        (MINE.replace("schema = 1", "schema = 2"), "schema = 2: must be 1"),
        (MINE.replace("schema = 1", ""), "schema = None: must be 1"),
        (MINE.replace('id = "mine"', ""), "id = None"),
        (MINE.replace('"mine"', '"My board"'), "id = 'My board'"),
        ("schema = [", "must be a readable TOML file"),
        (OVER.replace("raspberry-pi-5", "pi"), "applies_to = 'pi': must be one of"),
        (OVER.replace("raspberry-pi-5", "base"), "applies_to = 'base': must be one of"),
        (OVER + 'extends = "base"\n', "extends = 'base': must be absent beside applies_to"),
        (MINE + "abstract = 1\n", "abstract = 1: must be true or false"),
        ('schema = 1\nid = "mine"\ntitle = "Mine"\n', "hardware = None: must be given"),
    ],
)
def test_a_file_that_fits_nowhere_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        read(tmp_path, wrong=text).every()
    assert str(tmp_path / "wrong.toml") in str(caught.value)


def test_a_circle_of_several_profiles_is_named_in_full(tmp_path: Path) -> None:
    other = MINE.replace("mine", "other").replace("raspberry-pi-5", "mine")
    library = read(tmp_path, mine=MINE.replace("raspberry-pi-5", "other"), other=other)
    with pytest.raises(ConfigError, match=r"no circle \(mine -> other -> mine\)"):
        library.profile("mine")


def test_an_unknown_profile_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile = 'toaster': must be one of generic-aarch64"):
        read(tmp_path).profile("toaster")
    with pytest.raises(ConfigError, match="must be one of"):
        read(tmp_path).profile("base")


def test_further_files_are_checked_with_the_library(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINE, encoding="utf-8")
    assert "mine" in with_files(read(tmp_path / "none"), [file]).ids()


def test_the_published_schema_is_that_of_the_classes() -> None:
    file = resources.files("tidegate.profiles") / "profile.schema.json"
    assert json.loads(file.read_text(encoding="utf-8")) == profile_schema()


def test_the_schema_knows_every_key_of_a_profile() -> None:
    keys = set(profile_schema()["properties"])
    assert keys == {*Profile.__dataclass_fields__, "applies_to"}
