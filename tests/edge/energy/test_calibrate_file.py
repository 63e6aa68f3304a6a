"""A calibration file keeps what it held, belongs to one device, and is replaced whole or not."""

from __future__ import annotations

import datetime
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.calibrate_file import (
    SOURCE,
    check_no_worse,
    check_writable,
    read_table,
    with_costs,
    write_table,
)
from tidegate.edge.energy.profile import Calibration, FittedCosts, FittedMode
from tidegate.edge.energy.profile_files import read_fitted, read_library
from tidegate.edge.energy.toml_text import toml_text
from tidegate.errors import ConfigError, ExecutionError

BOARD, DEVICE = "generic-x86-64", "a processor, 2 cores"
COSTS = FittedCosts(
    model="assistant",
    weights="00ff",
    executor="onnx",
    rows=4,
    date="2026-11-22",
    scope="package",
    load_s=0.25,
    mode=(
        FittedMode(
            name="as it is",
            prefill_token_s=2e-5,
            step_s=1 / 3,
            row_s=0.01,
            prefill_w=9.0,
            decode_w=8.0,
            idle_w=2.5,
            prefill_r2=0.99,
            src={"*": SOURCE},
        ),
    ),
    src={"*": SOURCE},
)
RECORD = Calibration(date="2026-11-22", r2=0.99, residual=0.05, device=DEVICE, src={"*": SOURCE})


def put(table: dict[str, Any], costs: FittedCosts = COSTS) -> dict[str, Any]:
    """`table` with `costs`."""
    return with_costs(table, costs, RECORD, profile_id=BOARD, note="a test")


def test_what_is_written_is_a_good_calibration_and_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "calibration.toml"
    write_table(file, put({}))
    (found,) = read_fitted(file, BOARD)
    assert found == replace(COSTS, mode=(replace(COSTS.mode[0], step_s=0.333333),))
    profile = read_library(tmp_path / "none", file).profile(BOARD)
    assert profile.cost == (found,)
    assert profile.status == "calibrated"
    assert profile.calibration is not None
    assert profile.calibration.device == DEVICE
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [file]


def test_other_models_and_whatever_else_the_file_says_stay(tmp_path: Path) -> None:
    file = tmp_path / "calibration.toml"
    own = {"energy": {"idle": [{"w": 3.0, "scope": "wall", "src": "meter"}]}}
    sources = {"sources": {"meter": {"kind": "measured", "note": "mine"}}}
    write_table(file, put({**own, **sources}))
    other = replace(COSTS, model="other", weights="11ee")
    again = replace(COSTS, rows=8)
    for costs in (other, again, replace(COSTS, date="2026-12-01")):
        write_table(file, put(read_table(file, profile_id=BOARD, device=DEVICE), costs))
    found = read_fitted(file, BOARD)
    assert [(one.model, one.rows, one.date) for one in found] == [
        ("other", 4, "2026-11-22"),
        ("assistant", 8, "2026-11-22"),
        ("assistant", 4, "2026-12-01"),
    ]
    profile = read_library(tmp_path / "none", file).profile(BOARD)
    assert [one.w for one in profile.energy.idle] == [3.0]


@pytest.mark.parametrize(
    ("board", "device", "told"),
    [
        ("raspberry-pi-5", DEVICE, "of this board"),
        (BOARD, "another processor, 4 cores", "of this device"),
    ],
)
def test_the_file_of_another_device_is_not_overwritten(
    tmp_path: Path, board: str, device: str, told: str
) -> None:
    file = tmp_path / "calibration.toml"
    write_table(file, put({}))
    with pytest.raises(ConfigError, match=told + r" .*another --output"):
        read_table(file, profile_id=board, device=device)


@pytest.mark.parametrize("data", [b"schema = [", b"\xff\xfe"])
def test_what_is_no_calibration_is_not_overwritten(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"output = .*notes\.txt"):
        read_table(file, profile_id=BOARD, device=DEVICE)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cost = 5", "cost = 5: must be an array"),
        ('cost = ["x"]', r"cost\[0\]"),
        ("sources = 3", "sources = 3: must be a table"),
        ("calibration = 3", "calibration = 3: must be a table"),
        ("schema = 2", "schema"),
        ("service = {}", "service"),
    ],
)
def test_a_file_that_no_daemon_could_read_is_refused_before_anything_is_measured(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "calibration.toml"
    head = "" if text.startswith("schema") else "schema = 1\n"
    file.write_text(f'{head}applies_to = "{BOARD}"\n{text}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"output = .*{told}.*another --output"):
        read_table(file, profile_id=BOARD, device=DEVICE)


def test_bad_costs_replace_bad_ones_and_those_of_other_settings_but_no_good_ones() -> None:
    def off(error: float) -> FittedCosts:
        return replace(COSTS, mode=(replace(COSTS.mode[0], prefill_error=error),))

    check_no_worse([off(0.5)], off(0.6))
    check_no_worse([off(0.02)], off(0.25))
    check_no_worse([replace(off(0.02), kv_precision="u8")], off(0.6))
    with pytest.raises(ExecutionError, match=r"are 60% off .* 2026-11-22 were 2% off.*--replace"):
        check_no_worse([off(0.02)], off(0.6))


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output = "):
        check_writable(tmp_path / "file" / "calibration.toml")
    with pytest.raises(ConfigError, match="not a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "calibration.toml")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "calibration.toml"
    write_table(file, put({}))
    before = file.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_table(file, put({}, replace(COSTS, rows=8)))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


keys = st.text(min_size=1, max_size=6)
plain = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.text(max_size=12),
    st.dates(),
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=10,
)


@given(table=st.dictionaries(keys, values, max_size=4))
def test_every_table_is_read_back_as_it_was(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(table)) == table


def test_what_toml_does_not_have_is_refused() -> None:
    assert tomllib.loads(toml_text({"a": math.inf})) == {"a": math.inf}
    assert tomllib.loads(toml_text({"t": datetime.time(7, 30)})) == {"t": datetime.time(7, 30)}
    with pytest.raises(TypeError, match="NoneType is no type of TOML"):
        toml_text({"a": None})
