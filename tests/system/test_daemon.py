"""A device daemon as strangers and supervisors meet it: bad requests, hang-ups, signals."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from services import TIDEGATE, Service, Services, run_tidegate, until
from streams import chat, streamed
from wordmodel import write_word_checkpoint

pytestmark = pytest.mark.system

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def device(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Services(tmp_path_factory.mktemp("daemon")) as services:
        yield services.serve(bundle)


def running(device: Service) -> int:
    return int(device.get("/status")["engine"]["running"])


def answers(device: Service) -> None:
    """The daemon still answers a good request."""
    response = httpx.post(f"{device.url}{CHAT}", json=chat("hello", max_tokens=3), timeout=20)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body"),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": NaN}', 400, "body"),
        (b"\xff\xfe", 400, "body"),
        (b"[" * 100_000, 400, "body"),
        (b"[]", 400, "body"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": "hello"}', 400, "messages"),
        (b'{"messages": [{"role": "user", "content": 7}]}', 400, "messages[0].content"),
        (b'{"messages": [{"content": "a"}]}', 400, "messages[0].role"),
        (b'{"messages": [{"role": "user", "content": "a"}], "stream": "yes"}', 400, "stream"),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}', 400, "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "a"}], "top_p": 2}', 400, "top_p"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tidegate": {"route": "moon"}}',
            400,
            "tidegate.route",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}], "model": "x"}', 404, "model"),
        (
            b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"a" * 1_000_000),
            413,
            "messages",
        ),
        (b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"a" * 3_000_000), 413, "body"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_a_bad_request_is_told_its_field_and_harms_nobody(
    device: Service, body: bytes, status: int, param: str
) -> None:
    response = httpx.post(f"{device.url}{CHAT}", content=body, headers=JSON, timeout=20)
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"]
    assert len(error["message"]) < 400
    answers(device)


def test_a_prompt_beyond_every_context_is_refused_with_both_limits(device: Service) -> None:
    response = httpx.post(f"{device.url}{CHAT}", json=chat("a" * 4000), timeout=20)
    assert response.status_code == 422
    assert "it holds 1024" in response.json()["error"]["message"]
    answers(device)


def test_clients_that_hang_up_leave_nothing_running(device: Service) -> None:
    body = chat("count the waves", max_tokens=900, ignore_eos=True, tidegate={"route": "edge"})
    for number in range(4):
        with streamed(device.url, body | {"seed": number, "temperature": 1}) as stream:
            stream.read(3)
            assert running(device) == 1
        until(lambda: running(device) == 0, "the engine is free", within_s=3)
    cancelled = device.get("/status")["engine"]["cancelled"]
    assert cancelled >= 4
    answers(device)


def test_sigterm_lets_the_stream_end_and_exits_with_0(bundle: Path, tmp_path: Path) -> None:
    with Services(tmp_path) as services:
        device = services.serve(bundle)
        body = chat("tell a long tale", max_tokens=900, ignore_eos=True)
        with streamed(device.url, body) as stream:
            stream.read(3)
            device.process.send_signal(signal.SIGTERM)
            until(lambda: not ready(device), "the daemon is no longer ready", within_s=5)
            refused = httpx.post(f"{device.url}{CHAT}", json=chat("late"), timeout=10)
            assert refused.status_code == 503
            stream.read()
        assert stream.done
        assert stream.usage["completion_tokens"] == 900
        assert device.process.wait(20) == 0
        assert "Traceback" not in device.log.read_text()


def ready(device: Service) -> bool:
    return httpx.get(f"{device.url}/ready", timeout=10).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda one: one.name)
def test_an_idle_daemon_stops_at_once(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    with Services(tmp_path) as services:
        device = services.serve(bundle, "--executor", "onnx")
        began_s = time.monotonic()
        device.process.send_signal(number)
        assert device.process.wait(20) == 0
        assert time.monotonic() - began_s < 15, "half of what a drain may take"
        assert "Traceback" not in device.log.read_text()


def test_chat_prints_the_answer_apart_from_where_it_ran(device: Service) -> None:
    asked = ("chat", "which lamp?", "--url", device.url, "--max-tokens", "9", "--privacy", "local")
    done = run_tidegate(*asked)
    assert done.returncode == 0, done.stderr
    body = chat("which lamp?", max_tokens=9)
    whole = httpx.post(f"{device.url}{CHAT}", json=body, timeout=20).json()
    assert done.stdout == whole["choices"][0]["message"]["content"] + "\n"
    assert done.stderr.startswith("[edge: private (local)")
    assert "9 tokens" in done.stderr
    refused = run_tidegate(*asked, "--route", "cloud", "--wait", "0")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "never leaves the device" in refused.stderr


def test_two_daemons_do_not_share_a_port(device: Service, bundle: Path) -> None:
    address = device.url.removeprefix("http://")
    done = run_tidegate("serve", str(bundle), "--listen", address)
    assert done.returncode == 1
    port = address.rsplit(":", 1)[1]
    assert done.stderr == (
        f"tidegate: port = {port}: must be free: another process listens on {address}\n"
    )
    answers(device)


def test_a_conversion_that_is_killed_leaves_no_bundle(tmp_path: Path) -> None:
    checkpoint = write_word_checkpoint(tmp_path / "deep", layers=40)
    out = tmp_path / "made" / "bundle"
    command = [*TIDEGATE, "convert", str(checkpoint), "--out", str(out), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: out.parent.is_dir() and any(out.parent.iterdir()), "it writes", within_s=60)
    finally:
        process.kill()
        process.wait(20)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    done = run_tidegate("convert", str(checkpoint), "--out", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    assert run_tidegate("inspect", str(out)).returncode == 0
