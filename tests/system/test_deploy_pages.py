"""docs/deploy is true: every command of mosquitto.md runs as written, every number is ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from linkbrokers import find_mosquitto, free_port

from tidegate.link.mosquitto import rules
from tidegate.link.mqtt_connection import KEEPALIVE_S, WINDOW_PUBLISHES
from tidegate.link.topics import Topics
from tidegate.link.wire import MAX_MESSAGE_BYTES

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
MOSQUITTO = (DEPLOY / "mosquitto.md").read_text(encoding="utf-8")
OTHERS = (DEPLOY / "other-brokers.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.system
@pytest.mark.timeout(120)
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "tidegate": f'exec {sys.executable} -P -m tidegate.cli "$@"',
        # Root may not give up its rights here: mosquitto's user cannot reach this folder.
        "mosquitto": f'[ "$(id -u)" = 0 ] && echo user root >> "$2"; exec {find_mosquitto()} "$@"',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    commands = "\n".join(BLOCK.findall(MOSQUITTO))
    port = free_port()
    config = "tidegate broker config broker/"
    commands = commands.replace(config, f"{config} --port {port}").replace(":8883", f":{port}")
    done = subprocess.run(
        ["bash", "-c", f"set -eu\ntrap 'kill $(jobs -p) 2> jobs.log || true' EXIT\n{commands}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    log = tmp_path / "broker.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    assert "tidegate doctor link: fine" in done.stdout
    assert "certificate revoked" in done.stdout


def test_the_pages_numbers_are_ours() -> None:
    assert MAX_MESSAGE_BYTES == 96 * 1024
    assert "at most 96 KiB" in OTHERS
    assert f"at most {WINDOW_PUBLISHES} per connection" in OTHERS
    assert f"| keepalive | {KEEPALIVE_S} s |" in OTHERS
    longest = Topics("g" * 64).request("w" * 64, "h" * 32)
    assert longest.count("/") == 6
    assert len(longest) <= 210


def test_the_rules_for_emqx_name_the_topics_of_ours() -> None:
    emqx = OTHERS.replace("${username}", "%u")
    for line in rules("home", ("gw0",)).splitlines():
        if line.startswith(("pattern", "topic")):
            assert f'"{line.split()[-1]}"' in emqx, line
