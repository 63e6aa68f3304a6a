"""`cloud.toml`: flags before the file before defaults, and nothing wrong or unknown passes."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tidegate.cli.cloud import add_arguments, read_settings, run
from tidegate.cli.cloud_models import EXECUTOR_KEYS
from tidegate.cli.executor_flags import add_executor
from tidegate.cli.main import main
from tidegate.cloud.model_settings import AdapterSettings
from tidegate.errors import ConfigError

FILE = """
listen = "127.0.0.1:0"
drain = 5
restart-when-stuck = true
models-mib = 900
rows = 4
embedder = ["words=encoders/words"]

[[model]]
name = "big"
path = "models/big"

[[model]]
name = "small"
path = "/srv/small"
rows = 2
context = 128
load = "start"
most-adapters = 2

[[model.adapter]]
name = "poet"
path = "adapters/poet"
"""


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def written(folder: Path, text: str) -> str:
    path = folder / "cloud.toml"
    path.write_text(text)
    return str(path)


def test_a_file_has_the_flags_of_the_command_and_tables_of_models(tmp_path: Path) -> None:
    found = read_settings(parsed("--config", written(tmp_path, FILE)))
    assert (found.drain_s, found.restart_when_stuck, found.port) == (5.0, True, 0)
    assert found.models.models_mib == 900
    assert [one.path for one in found.encoders.embedders] == [tmp_path / "encoders/words"]
    big, small = found.models.models
    assert (big.name, big.path, big.load) == ("big", tmp_path / "models/big", "start")
    assert (big.executor.rows, big.executor.context_tokens) == (4, None)
    assert (small.name, small.path, small.load) == ("small", Path("/srv/small"), "start")
    assert (small.executor.rows, small.executor.context_tokens) == (2, 128)
    assert small.most_adapters == 2
    assert small.adapters == (AdapterSettings(name="poet", path=tmp_path / "adapters/poet"),)


def test_flags_count_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, FILE)
    found = read_settings(parsed("extra", "--config", file, "--rows", "9", "--drain", "30"))
    assert found.drain_s == 30.0, "given, although it is the default"
    assert [model.name for model in found.models.models] == ["extra", "big", "small"]
    assert [model.executor.rows for model in found.models.models] == [9, 9, 2]


def test_without_a_file_one_model_is_as_simple_as_ever() -> None:
    found = read_settings(parsed("models/mine", "--model", "other=models/other"))
    mine, other = found.models.models
    assert (mine.name, mine.load) == ("mine", "start")
    assert (other.name, other.path, other.load) == ("other", Path("models/other"), "first-use")
    assert found.drain_s == 30.0
    assert found.update == "beside"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("wors = 3", r"^wors = 3: must be one of the settings: .*rows"),
        ('rows = "3"', "^rows = '3': must be a whole number"),
        ("rows = true", "^rows = True: must be a whole number"),
        ("drain = []", r"^drain = \[\]: must be a number"),
        ("listen = 8090", "^listen = 8090: must be a text"),
        ("restart-when-stuck = 1", "^restart-when-stuck = 1: must be true or false"),
        ('update = "now"', "^update = 'now': must be one of beside, drain-first"),
        ('link-http-name = "x"', "^link-http-name = 'x': must be a list"),
        ("model = 3", r"^model = 3: must be tables, \[\[model\]\]"),
        ('[[model]]\nname = "a"', r"^\[\[model\]\] path = None: must be a text"),
        ('[[model]]\nname="a"\npath="b"\nport=1', r"^port = 1: must be one of a \[\[model\]\]'s"),
        ('[[model]]\nname="a"\npath="b"\nqueue-limit=0', "^queue_limit = 0: must be at least 1"),
        ('[[model]]\nname="a"\npath="b"\nload="later"', "^load = 'later': must be one of start"),
        ('[[model]]\nname="a"\npath="b"\n' * 2, "^name = 'a': must be one that no other model"),
        ("", r"^model = None: must be a MODEL, --model NAME=PATH, or \[\[model\]\]"),
        ("rows = ", r"^config = '.*cloud\.toml': must be TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_settings(parsed("--config", written(tmp_path, text)))


def test_a_wrong_value_is_refused_although_a_flag_counts_before_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows"):
        read_settings(parsed("m", "--config", written(tmp_path, "rows = false"), "--rows", "3"))


def test_print_config_shows_what_holds_and_its_origin_and_no_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'link = "mqtt://me:secret@broker:1883"\nkeys = "gateway"\n' + FILE
    args = parsed("--config", written(tmp_path, text), "--stall-after", "9", "--print-config")
    assert run(args) == 0
    shown = capsys.readouterr().out
    assert "secret" not in shown
    lines = shown.splitlines()
    assert 'link = "mqtt://...@broker:1883"  # file' in lines
    assert "stall-after = 9.0  # flag" in lines
    assert 'log-format = "text"  # default' in lines
    assert "# threads: not set" in lines
    again: dict[str, Any] = tomllib.loads(shown)
    assert [model["name"] for model in again["model"]] == ["big", "small"]
    kept = [line for line in lines if not line.startswith(("link = ", "keys = "))]
    (tmp_path / "cloud.toml").write_text("\n".join(kept))
    first = read_settings(parsed("--config", str(tmp_path / "cloud.toml")))
    assert first.models == read_settings(parsed("--config", written(tmp_path, FILE))).models


def test_a_file_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cloud", "--config", str(tmp_path / "none.toml")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("tidegate: config = ")
    assert "No such file" in told


def test_settings_of_the_executor_are_those_that_a_model_may_have_of_its_own() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_executor(parser)
    flags = [action.option_strings[0].removeprefix("--") for action in parser._actions]
    assert {"context", *flags} == set(EXECUTOR_KEYS)
