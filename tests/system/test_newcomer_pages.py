"""The pages for one machine, two gateways and Ray: every command runs as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import logs, run_page

pytestmark = pytest.mark.system


@pytest.mark.timeout(200)
def test_one_machine(tmp_path: Path) -> None:
    done = run_page("docs/deploy/one-machine.md", tmp_path, ports=(8090,), within_s=180)
    assert done.returncode == 0, done.stdout + done.stderr + logs(tmp_path)
    assert '"object":"chat.completion"' in done.stdout
    assert "tidegate_num_requests_running" in done.stdout
    assert done.stdout.endswith("drained\n")


@pytest.mark.timeout(300)
def test_mosquitto_and_two_gateways(tmp_path: Path) -> None:
    ports = (8090, 8091, 8080, 8883)
    done = run_page("docs/deploy/two-gateways.md", tmp_path, ports=ports, within_s=280)
    assert done.returncode == 0, done.stdout + done.stderr + logs(tmp_path)
    assert done.stderr.count("[cloud: asked for the cloud") == 2


@pytest.mark.timeout(500)
def test_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ports = (8090, 8080, 1883)
    done = run_page("docs/deploy/ray.md", tmp_path, ports=ports, within_s=480)
    assert done.returncode == 0, done.stdout + done.stderr + logs(tmp_path)
    assert '"object":"chat.completion"' in done.stdout
    assert '"front": {"asked": ' in done.stdout
    assert "[cloud: asked for the cloud" in done.stderr
