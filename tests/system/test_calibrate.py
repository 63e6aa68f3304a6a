"""A calibration that is interrupted leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import START_S, TIDEGATE, until
from wordmodel import write_word_checkpoint

from tidegate.converters.convert import ConversionPlan, convert
from tidegate.converters.recipe import make_recipe

pytestmark = pytest.mark.system


@pytest.fixture
def hangs_up() -> Iterator[None]:
    """The end of a terminal ends programs, even where these tests outlive one."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangs_up")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name
)
def test_an_interrupted_calibration_keeps_the_old_file(
    tmp_path: Path, number: signal.Signals
) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "model", context=512)
    recipe = make_recipe(bits=4, group_size=64, symmetric=False)
    plan = ConversionPlan(model_id="tiny", targets=("onnx",), recipe=recipe)
    bundle = convert(checkpoint, tmp_path / "bundle", plan).folder
    kept = tmp_path / "kept"
    kept.mkdir()
    old = 'schema = 1\napplies_to = "generic-x86-64"\n'
    (kept / "calibration.toml").write_text(old, encoding="utf-8")
    log = tmp_path / "log"
    with log.open("w") as stderr:
        command = [*TIDEGATE, "profile", "calibrate", str(bundle), "--profile", "generic-x86-64"]
        command += ["--output", str(kept / "calibration.toml"), "--minutes", "30"]
        process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
        try:
            # The line of what it takes comes before the model is loaded; then wait for steps.
            until(lambda: _measures(process, log), "it measures", within_s=START_S)
            process.send_signal(number)
            assert process.wait(timeout=START_S) == 130
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert (kept / "calibration.toml").read_text(encoding="utf-8") == old
    assert [one.name for one in kept.iterdir()] == ["calibration.toml"]
    assert "Traceback" not in log.read_text()


def _measures(process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    return "executor auto" in log.read_text() and _busy_s(process.pid) > 4


def _busy_s(pid: int) -> float:
    """Processor seconds that it took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
