"""API keys on Ray: two fronts that count in one Redis spend nothing twice."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from redisserver import redis_server
from services import Services, run_tidegate
from streams import chat

pytest.importorskip("ray", reason="the extra `ray` is not installed")
psutil = pytest.importorskip("psutil")

ALLOWED, ASKED = 15, 60


@pytest.mark.system
@pytest.mark.timeout(400)
def test_two_fronts_grant_what_one_would(tmp_path: Path, edge_checkpoint: Path) -> None:
    state = str(tmp_path / "state")
    # A day's quota: nothing flows back while the test runs, but for a midnight.
    rules = ("--quota-requests-day", str(ALLOWED))
    made = run_tidegate("keys", "api", "add", state, "team", *rules)
    assert made.returncode == 0, made.stderr
    heads = {"Authorization": f"Bearer {made.stdout.split()[-1]}"}
    with redis_server(tmp_path) as redis, Services(tmp_path) as services:
        service = services.tidegate(
            "ray",
            *("ray", str(edge_checkpoint), "--listen", "127.0.0.1:0", "--fronts", "2"),
            *("--replicas", "1", "--cpus", "0.1", "--threads", "1", "--drain", "5"),
            *("--state", state, "--limits-redis", redis.url),
            within_s=240.0,
        )
        url = f"{service.url}/v1/chat/completions"
        assert httpx.post(url, json=chat("hello"), timeout=30).status_code == 401

        def ask(number: int) -> httpx.Response:
            body = chat(f"number {number}", max_tokens=2)
            return httpx.post(url, json=body, headers=heads, timeout=60)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(ASKED)))
        family = psutil.Process(service.process.pid).children(recursive=True)
        fronts = [one for one in family if "ServeReplica:tidegate:Front" in " ".join(one.cmdline())]
        assert len(fronts) == 2
        told = httpx.get(f"{service.url}/metrics", timeout=30).text
        assert "tidegate_ray_asked_total" in told
        assert "\nvllm:" in told
        assert service.stop() == 0
    assert Counter(one.status_code for one in answers) == {200: ALLOWED, 429: ASKED - ALLOWED}
    refused = [one for one in answers if one.status_code == 429]
    assert all(one.json()["error"]["code"] == "insufficient_quota" for one in refused)
    assert all(int(one.headers["Retry-After"]) > 0 for one in refused)
