"""A model over two processes as people start it: the same tokens, and they live and die as one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import Service, Services, run_tidegate, until

pytestmark = pytest.mark.system

SPLIT = ("--tensor-parallel", "2", "--rows", "2", "--step-tokens", "64", "--context", "256")
PROMPTS = ("the pump is on", "0123456789 abcdef", "a")


@pytest.fixture(scope="module")
def packed(edge_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edge checkpoint as a bundle for the cloud, signed."""
    folder = tmp_path_factory.mktemp("packed")
    key = folder / "key"
    flags = ("--target", "packed", "--group-size", "32", "--quiet")
    for command in (
        ("convert", str(edge_checkpoint), "--out", str(folder / "b"), *flags),
        ("keys", "signing", str(key)),
        ("bundle", "sign", str(folder / "b"), "--key", f"{key}.key"),
    ):
        done = run_tidegate(*command)
        assert done.returncode == 0, done.stderr
    return folder


def answer(service: Service, prompt: str, **settings: Any) -> str:
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    got = httpx.post(f"{service.url}/v1/completions", json=body | settings, timeout=60)
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["text"])


def others(service: Service) -> list[int]:
    """The processes that a service has started, and theirs."""
    found, asked = [], [service.process.pid]
    while asked:
        pid = asked.pop()
        for task in Path(f"/proc/{pid}/task").iterdir():
            children = [int(one) for one in (task / "children").read_text().split()]
            found += children
            asked += children
    return found


def ranks(service: Service) -> list[int]:
    """Those of them that run a part of the model."""
    return [pid for pid in others(service) if b"spawn_main" in _command(pid)]


def gone(pids: list[int]) -> bool:
    return not any(_command(pid) for pid in pids)


def _command(pid: int) -> bytes:
    """Empty for a process that is gone, or has ended and was not waited for."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_two_processes_answer_as_one_and_a_stop_drains_both(
    tmp_path: Path, edge_checkpoint: Path
) -> None:
    with Services(tmp_path) as services:
        one = services.cloud(edge_checkpoint, "--executor", "torch", "--context", "256")
        expected = [answer(one, prompt) for prompt in PROMPTS]
        one.close()
        two = services.cloud(edge_checkpoint, *SPLIT)
        assert [answer(two, prompt) for prompt in PROMPTS] == expected
        drawn = {"temperature": 1.0, "seed": 7}
        assert answer(two, "a", **drawn) == answer(two, "a", **drawn) != expected[2]
        log = two.log.read_text()
        for rank in (0, 1):
            assert f"rank {rank} on cpu takes\n  weights" in log
        processes = others(two)
        assert len(ranks(two)) == 1
        last: list[str] = []
        asking = threading.Thread(target=lambda: last.append(answer(two, "a", max_tokens=200)))
        asking.start()
        until(lambda: two.running > 0, "the answer has begun")
        # As who ends all processes of a service at once.
        for pid in (two.process.pid, *ranks(two)):
            os.kill(pid, signal.SIGTERM)
        asking.join(60)
        assert two.process.wait(60) == 0, two.log.read_text()
        assert last
        assert last[0].startswith(expected[2])
        until(lambda: gone(processes), "all processes end")
        assert "Traceback" not in two.log.read_text()


def test_one_that_dies_takes_all_with_it_and_the_status_asks_for_a_start(
    tmp_path: Path, packed: Path, edge_checkpoint: Path
) -> None:
    trust = ("--trust", str(packed / "key.pub"))
    with Services(tmp_path) as services:
        one = services.cloud(packed / "b", "--executor", "torch", "--context", "256", *trust)
        expected = [answer(one, prompt) for prompt in PROMPTS]
        one.close()
        two = services.cloud(packed / "b", *SPLIT, *trust)
        assert [answer(two, prompt) for prompt in PROMPTS] == expected
        processes, (rank,) = others(two), ranks(two)
        ended: list[str] = []

        def ask() -> None:
            try:
                ended.append(answer(two, "a", max_tokens=200))
            except (httpx.HTTPError, AssertionError) as error:
                ended.append(type(error).__name__)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: two.running > 0, "the answer has begun")
        os.kill(rank, signal.SIGKILL)
        assert two.process.wait(20) == 70
        asking.join(20)
        assert ended
        until(lambda: gone(processes), "all processes end")
        said = "rank 1 of the 2 processes that run the model was killed by signal 9"
        assert f"tidegate: {said}" in two.log.read_text()


def test_who_follows_ends_with_the_first_process(tmp_path: Path, edge_checkpoint: Path) -> None:
    with Services(tmp_path) as services:
        two = services.cloud(edge_checkpoint, *SPLIT)
        processes = others(two)
        assert ranks(two)
        two.kill()
        until(lambda: gone(processes), "all processes end")
