"""A daemon that nobody asks: it sleeps, and may let its model go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from services import Service, Services, run_tidegate, until
from streams import chat

pytestmark = pytest.mark.system

WATCHED_S = 4.0
MOST_CPU = 0.01
"""Of one core: what the daemon may use while nobody asks."""


def cpu_s(device: Service) -> float:
    """Processor seconds of the daemon, all threads."""
    fields = Path(f"/proc/{device.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def asked(device: Service) -> str:
    body = chat("hello there", max_tokens=20, tidegate={"cache": False})
    response = httpx.post(f"{device.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("executor", ["onnx", "openvino"])
def test_an_idle_daemon_uses_under_a_hundredth_of_a_core(
    bundle: Path, tmp_path: Path, executor: str
) -> None:
    with Services(tmp_path) as services:
        flags = ("--prefix-cache", str(tmp_path / "kept"), "--restart-when-stuck")
        device = services.serve(bundle, "--executor", executor, *flags)
        asked(device)
        time.sleep(1)
        began_s = cpu_s(device)
        time.sleep(WATCHED_S)
        assert cpu_s(device) - began_s < MOST_CPU * WATCHED_S + 0.01  # a tick of the clock


@pytest.mark.parametrize("executor", ["onnx", "openvino"])
def test_an_unloaded_model_is_healthy_and_comes_back_with_a_request(
    bundle: Path, tmp_path: Path, executor: str
) -> None:
    with Services(tmp_path) as services:
        device = services.serve(bundle, "--executor", executor, "--exact", "--unload-after", "0.5")
        first = asked(device)
        until(lambda: device.get("/status")["engine"]["loaded"] is False, "it is unloaded")
        assert httpx.get(f"{device.url}/ready").status_code == 200
        assert "unloaded" in device.get("/health")["detail"]
        assert not re.search(r"model\.(bin|onnx)", maps(device)), "its files are closed"
        moved = bundle.rename(bundle.with_name("moved"))
        try:
            body = chat("hello", max_tokens=3, tidegate={"cache": False})
            lost = httpx.post(f"{device.url}/v1/chat/completions", json=body, timeout=30)
            assert lost.status_code == 503
            assert "cannot be loaded again" in lost.json()["error"]["message"]
        finally:
            moved.rename(bundle)
        assert asked(device) == first
        assert device.stop() == 0


def maps(device: Service) -> str:
    return Path(f"/proc/{device.process.pid}/maps").read_text()


def test_a_daemon_that_would_not_fit_is_refused_with_the_sum(bundle: Path) -> None:
    done = run_tidegate("serve", str(bundle), "--listen", "127.0.0.1:0", "--memory-mib", "100")
    assert done.returncode == 1
    assert done.stderr.startswith("tidegate: memory_mib = 100: must be at least ")
    for line in ("weights ", "KV, 4 x 1024 tokens", "runtime, tokenizer and server", "sum "):
        assert line in done.stderr


@pytest.mark.parametrize("executor", ["onnx", "openvino"])
def test_a_daemon_stays_within_the_sum_and_does_not_grow(
    bundle: Path, tmp_path: Path, executor: str
) -> None:
    with Services(tmp_path) as services:
        device = services.serve(bundle, "--executor", executor)
        for _ in range(10):
            asked(device)
        memory = device.get("/status")["memory"]
        assert memory["resident_bytes"] <= memory["needed_bytes"]["sum_bytes"]
        for _ in range(60):
            asked(device)
        later = device.get("/status")["memory"]["resident_bytes"]
        assert later < 1.05 * memory["resident_bytes"]


STUCK = """
import asyncio, logging, threading
from toyengine import PAGED, ask, toy_engine
from toyexecutor import Behaviour, ToyExecutor
from tidegate.api.lifecycle import exit_when_stuck
from tidegate.engine.settings import EngineSettings

async def main():
    class Never(threading.Event):
        def wait(self, timeout=None):
            return super().wait()
    executor = ToyExecutor(PAGED, behaviour=Behaviour(gate=Never()))
    engine = toy_engine(executor, settings=EngineSettings(stall_after_s=0.2))
    loop = asyncio.create_task(engine.run())
    answer = engine.submit(ask("a", (1, 2, 3)))
    await exit_when_stuck(engine, every_s=0.1)

asyncio.run(main())
"""


def test_a_process_whose_step_never_returns_ends_with_the_status_for_its_supervisor() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", STUCK],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 70, done.stderr
    assert "the engine makes no progress" in done.stderr
