"""docs/models.md is true: its files are read, its numbers are those of the code."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tidegate.cli.cloud import add_arguments, read_settings
from tidegate.cloud.model_pool import ROOM_SHARE
from tidegate.cloud.model_settings import ModelSettings, PoolSettings
from tidegate.cloud.model_updates import MODES
from tidegate.cloud.pooled_model import RETRY_S, STATES
from tidegate.cloud.reload import PATH

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_files_of_the_page_are_read(tmp_path: Path) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "cloud.toml").write_text(block.replace("0.0.0.0", "127.0.0.1"))
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        found = read_settings(parser.parse_args(["--config", str(tmp_path / "cloud.toml")]))
        assert found.models.models[0].name == "assistant"


def test_the_numbers_and_names_of_the_page_are_those_of_the_code() -> None:
    model = ModelSettings(name="m", path=Path("m"))
    pool = PoolSettings(models=(model,))
    assert f"waits at most {pool.load_wait_s:.0f} s, half of it for others" in PAGE
    assert ROOM_SHARE == 0.5
    assert f"{pool.most_waiting} calls may wait for one model" in PAGE
    assert f"Tried again {RETRY_S:.0f} s later" in PAGE
    assert f"most-adapters = {model.most_adapters} " in PAGE
    assert f"queue-limit = {model.queue_limit}" in PAGE
    assert all(f"`{mode}`" in PAGE for mode in MODES)
    assert all(f"`{state}`" in PAGE for state in STATES)
    assert f"8090{PATH} " in PAGE
