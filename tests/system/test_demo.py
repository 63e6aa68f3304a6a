"""`tidegate demo` as people run it: it ends by itself with 0, or by Ctrl-C, and leaves nothing."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from services import TIDEGATE, until
from wordmodel import write_word_checkpoint

pytestmark = pytest.mark.system

REAL = Path(__file__).resolve().parents[2] / "examples" / "assistant"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The assistant's checkpoints where they are, else random ones: routes need no good answers."""
    if all((REAL / name / "model.safetensors").is_file() for name in ("edge", "cloud")):
        return REAL
    folder = tmp_path_factory.mktemp("models")
    write_word_checkpoint(folder / "edge", context=1024)
    # Its tokens are bytes, so the demo's longest prompt needs more than 2048 of them.
    write_word_checkpoint(folder / "cloud", context=4096, seed=1)
    return folder


def started(models: Path, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """A demo in a process group of its own, with its temporary files in `folder`."""
    return subprocess.Popen(
        [*TIDEGATE, "demo", "--models", str(models), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(folder), "COLUMNS": "200"},
        start_new_session=True,
    )


def ended(demo: subprocess.Popen[str]) -> None:
    """End the demo and whatever it may have left, which is in its process group."""
    with suppress(ProcessLookupError):
        os.killpg(demo.pid, signal.SIGKILL)
    demo.wait(20)
    assert demo.stdout is not None
    demo.stdout.close()


def group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def read_until(demo: subprocess.Popen[str], line_has: str, *, within_s: float) -> str:
    """What the demo printed, to the first line with `line_has`."""
    assert demo.stdout is not None
    os.set_blocking(demo.stdout.fileno(), False)
    printed, deadline_s = "", time.monotonic() + within_s
    with selectors.DefaultSelector() as selector:
        selector.register(demo.stdout, selectors.EVENT_READ)
        while line_has not in printed:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, printed
            if selector.select(left_s):
                piece = os.read(demo.stdout.fileno(), 1 << 16)
                assert piece, f"the demo ended:\n{printed}"
                printed += piece.decode(errors="replace")
    return printed


def test_the_demo_takes_every_route_and_leaves_nothing(models: Path, tmp_path: Path) -> None:
    demo = started(models, tmp_path)
    try:
        printed, _ = demo.communicate(timeout=150)
        assert demo.returncode == 0, printed
        assert "unexpected" not in printed
        for route in ("edge", "cloud", "cache", "refused"):
            assert f" {route} " in printed
        until(lambda: group_is_empty(demo.pid), "no child is left", within_s=5)
        assert list(tmp_path.glob("tidegate-demo-*")) == []
    finally:
        ended(demo)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_demo_that_is_kept_shows_where_it_listens_and_ends_when_told(
    models: Path, tmp_path: Path, number: signal.Signals
) -> None:
    demo = started(models, tmp_path, "--keep")
    try:
        printed = read_until(demo, "Ctrl-C", within_s=150)
        words = printed.split()
        device = next(word for word in reversed(words) if word.endswith("/status"))
        assert httpx.get(device, timeout=10).json()["link"]["reachable"]
        assert any(word.startswith("mqtt://127.0.0.1:") for word in words)
        demo.send_signal(number)
        assert demo.wait(40) == 0
        until(lambda: group_is_empty(demo.pid), "no child is left", within_s=5)
        assert list(tmp_path.glob("tidegate-demo-*")) == []
    finally:
        ended(demo)


def test_ctrl_c_in_the_middle_of_the_demo_leaves_nothing(models: Path, tmp_path: Path) -> None:
    demo = started(models, tmp_path)
    try:
        read_until(demo, "broker mqtt://", within_s=120)
        # A terminal sends it to the whole group.
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(40) == 130
        until(lambda: group_is_empty(demo.pid), "no child is left", within_s=5)
        assert list(tmp_path.glob("tidegate-demo-*")) == []
    finally:
        ended(demo)
