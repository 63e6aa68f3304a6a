"""Debian's prometheus for tests: a port and folder of its own, asked as Grafana asks it."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import free_port, until

SCRAPE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Series:
    """One answer to a query."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True, kw_only=True)
class PrometheusServer:
    """A server that scrapes every half a second."""

    url: str

    def query(self, expression: str) -> list[Series]:
        """The value now; an expression that is none fails the test."""
        told = self.get("query", query=expression)
        assert told["resultType"] == "vector", expression
        return [
            Series(labels=one["metric"], value=float(one["value"][1])) for one in told["result"]
        ]

    def finite(self, expression: str) -> bool:
        """Whether it answers with a number; a quantile of nothing is none."""
        return any(math.isfinite(one.value) for one in self.query(expression))

    def get(self, what: str, **parameters: Any) -> Any:
        """The data of a question of the HTTP API."""
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=10)
        told = answer.json()
        assert told["status"] == "success", f"{parameters}: {told.get('error')}"
        return told["data"]


def promtool(*arguments: str) -> str:
    """Run it; what it says. Skips the test where it is not installed."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def prometheus_server(
    folder: Path, targets: Sequence[str], *, rules: Path | None = None
) -> Iterator[PrometheusServer]:
    """A server of the job `tidegate` while the block runs. Skips where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    hosts = ", ".join(f'"{target.removeprefix("http://")}"' for target in targets)
    config = folder / "prometheus.yml"
    config.write_text(
        f"global: {{scrape_interval: {SCRAPE_S * 1000:.0f}ms, evaluation_interval: 1s}}\n"
        + ("" if rules is None else f"rule_files: ['{rules}']\n")
        + "scrape_configs:\n"
        + f"  - job_name: tidegate\n    static_configs: [{{targets: [{hosts}]}}]\n"
    )
    promtool("check", "config", str(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: _ready(address), "prometheus is ready")
        yield PrometheusServer(url=f"http://{address}")
    finally:
        process.terminate()
        process.wait(20)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/-/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
