"""A storm of calls, good and bad: nothing that was said and no key is in any file that remains."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from services import Service, Services, run_tidegate, until

pytestmark = pytest.mark.system

SECRET = "xylophone"
SAID = f"the {SECRET} heron nests"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": SAID}], "max_tokens": 6}
SCHEMA = {"type": "object", "properties": {SECRET: {"type": SECRET}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"

ASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, HELLO),
    (CHAT, HELLO | {"stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, HELLO | {"n": 3, "logprobs": True, "top_logprobs": 2}),
    (CHAT, HELLO | {"stop": [SECRET], "user": SECRET}),
    (CHAT, HELLO | {"model": f"model-{SECRET}"}),
    (CHAT, HELLO | {"temperature": SECRET}),
    (CHAT, HELLO | {SECRET: SECRET}),
    (CHAT, HELLO | {"messages": [{"role": SECRET, "content": SAID}]}),
    (CHAT, HELLO | {"messages": [{"role": "user", "content": SAID * 3000}]}),
    (CHAT, HELLO | {"max_tokens": 100_000}),
    (CHAT, HELLO | {"tools": [{"type": "function", "function": {"name": SECRET + "!"}}]}),
    (
        CHAT,
        HELLO
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
    ),
    (CHAT, HELLO | {"guided_regex": f"({SECRET}"}),
    (COMPLETE, {"prompt": SAID, "max_tokens": 4, "echo": True}),
    (COMPLETE, {"prompt": [10**9], "max_tokens": 4}),
    ("/v1/embeddings", {"input": SAID, "model": "m"}),
)


def storm(service: Service, keys: list[str]) -> list[int]:
    """Everything by every key, streams that are left, bodies that are none; the statuses."""

    def ask(number: int) -> int:
        path, body = ASKS[number % len(ASKS)]
        heads = {"Authorization": f"Bearer {keys[number % len(keys)]}"}
        return httpx.post(service.url + path, json=body, headers=heads, timeout=60).status_code

    def leave(number: int) -> int:
        heads = {"Authorization": f"Bearer {keys[0]}"}
        body = HELLO | {"stream": True, "max_tokens": 300, "ignore_eos": True}
        url = f"{service.url}{CHAT}"
        with httpx.stream("POST", url, json=body, headers=heads, timeout=60) as answer:
            next(answer.iter_bytes())
            return answer.status_code

    def garble(number: int) -> int:
        heads = {"Authorization": f"Bearer {keys[0]}", "traceparent": SECRET, SECRET: SAID}
        content = json.dumps(HELLO).encode()[: 10 + number]
        url = f"{service.url}{CHAT}?{SECRET}={SECRET}"
        return httpx.post(url, content=content, headers=heads, timeout=60).status_code

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(3 * len(ASKS))]
        left = [pool.submit(leave, number) for number in range(6)]
        garbled = [pool.submit(garble, number) for number in range(6)]
        return [one.result() for one in (*asked, *left, *garbled)]


def test_after_a_storm_no_file_holds_what_was_said_or_a_key(
    tmp_path: Path, edge_checkpoint: Path
) -> None:
    state = tmp_path / "state"
    keys = []
    for name, flags in (("free", ()), ("tight", ("--requests", "3/hour"))):
        done = run_tidegate("keys", "api", "add", str(state), name, *flags)
        keys.append(done.stdout.strip())
    wrong = "tg-" + SECRET * 4
    with Services(tmp_path) as services:
        common = ("--state", str(state), "--log-format", "json", "--metrics-per-key")
        service = services.cloud(edge_checkpoint, *common, "--name", "m")
        statuses = storm(service, [*keys, wrong])
        shown = httpx.get(f"{service.url}/metrics", timeout=10).text
        heads = {"Authorization": f"Bearer {keys[0]}"}
        shown += httpx.get(f"{service.url}/status", headers=heads, timeout=10).text
        until(lambda: service.running == 0, "the storm is over")
        assert service.stop() == 0
        log = service.log.read_text()
    assert {200, 400, 401, 429} <= set(statuses)
    assert not [status for status in statuses if status >= 500]
    for line in log.splitlines():
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys()
    assert "the client left" in log
    audit = (state / "audit.jsonl").read_text()
    assert len(audit.splitlines()) >= len(statuses)
    exported = run_tidegate("usage", "export", str(state)).stdout
    assert exported.count("\n") > 10
    files = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
    for name, data in {**files, "log": log.encode(), "shown": shown.encode()}.items():
        for secret in (SECRET, *keys):
            assert secret.encode() not in data, f"{secret} is in {name}"
