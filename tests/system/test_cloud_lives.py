"""The cloud service as its supervisor meets it: a hang, an orderly stop, a start again."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import hangingcloud
import httpx
import pytest
from services import Service, Services, free_port, until
from streams import chat, streamed

from tidegate.api.lifecycle import STUCK_STATUS

pytestmark = pytest.mark.system

CHAT = "/v1/chat/completions"


def hanging(services: Services, flag: Path, checkpoint: Path, port: int) -> Service:
    """A service whose steps hang while `flag` exists."""
    program = (sys.executable, "-P", hangingcloud.__file__, str(flag))
    listen = ("--listen", f"127.0.0.1:{port}", "--threads", "1")
    # Looks come six times as often: health fails for a second and more before the end.
    watch = ("--stall-after", "6", "--restart-when-stuck")
    return services.announced("cloud", [*program, "cloud", str(checkpoint), *listen, *watch])


def test_a_step_that_hangs_fails_health_ends_the_process_and_its_next_life_answers(
    edge_checkpoint: Path, tmp_path: Path
) -> None:
    flag, port = tmp_path / "hang", free_port()
    with Services(tmp_path) as services:
        first = hanging(services, flag, edge_checkpoint, port)
        whole = httpx.post(f"{first.url}{CHAT}", json=chat("hi", max_tokens=4), timeout=20)
        assert whole.status_code == 200
        flag.touch()
        ends: list[Exception] = []

        def ask() -> None:
            try:
                httpx.post(f"{first.url}{CHAT}", json=chat("hi", max_tokens=4), timeout=30)
            except httpx.TransportError as error:
                ends.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        health: list[int] = []
        while first.process.poll() is None:
            try:
                answer = httpx.get(f"{first.url}/health", timeout=5)
            except httpx.TransportError:
                break
            health.append(answer.status_code)
            if answer.status_code == 503:
                assert answer.headers["Retry-After"]
            time.sleep(0.05)
        assert first.process.wait(20) == STUCK_STATUS
        asking.join(20)
        assert len(ends) == 1, "its client is told by the connection's end"
        assert health[0] == 200
        assert 503 in health, "probes see it before the process ends"
        flag.unlink()
        second = hanging(services, flag, edge_checkpoint, port)
        again = httpx.post(f"{second.url}{CHAT}", json=chat("hi", max_tokens=4), timeout=20)
        assert again.json()["choices"] == whole.json()["choices"]


def test_sigterm_flips_readiness_finishes_what_runs_and_sends_away_what_waits(
    cloud_checkpoint: Path, tmp_path: Path
) -> None:
    with Services(tmp_path) as services:
        cloud = services.cloud(cloud_checkpoint, "--rows", "1", "--drain", "120")
        waiting: list[httpx.Response] = []

        def wait() -> None:
            waiting.append(
                httpx.post(f"{cloud.url}{CHAT}", json=chat("b", max_tokens=8), timeout=40)
            )

        asked = chat("a", max_tokens=1200, ignore_eos=True)
        # Open before: a new one may find the port closed.
        with httpx.Client(base_url=cloud.url, timeout=60) as probe:
            assert probe.get("/ready").status_code == 200
            with streamed(cloud.url, asked) as runs:
                runs.read(3)
                second = threading.Thread(target=wait)
                second.start()
                until(
                    lambda: cloud.metric("tidegate_num_requests_waiting") == 1,
                    "one waits",
                    within_s=60,
                )
                cloud.process.send_signal(signal.SIGTERM)
                until(
                    lambda: probe.get("/ready").status_code == 503, "it is not ready", within_s=60
                )
                assert probe.get("/health").status_code == 200, "and it is well"
                late = probe.post(CHAT, json=chat("c", max_tokens=8))
                refused: list[Any] = [late, *_joined(second, waiting)]
                for one in refused:
                    assert one.status_code == 503, one.text
                    assert one.headers["Retry-After"]
                    assert one.json()["error"]["code"] == "unavailable"
                assert not runs.done
                runs.read()
                assert runs.done
                assert runs.usage["completion_tokens"] == 1200
        assert cloud.process.wait(60) == 0


def _joined(thread: threading.Thread, found: list[httpx.Response]) -> list[httpx.Response]:
    thread.join(60)
    assert len(found) == 1
    return found
