"""API keys with limits in the real service: its page as written, a kill, and plain keys beside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from deployment import SAID, Deployment, to_cloud
from deployment import ask as ask_device
from redisserver import redis_server
from services import Service, Services, free_port, run_tidegate, until

from tidegate.cloud.audit import AuditSettings
from tidegate.cloud.failed_attempts import MOST_OF_A_SOURCE
from tidegate.cloud.usage import FLUSH_S, MOST_WAITING, UsageBook, exported
from tidegate.link.fleet import pair
from tidegate.link.identity import load_device

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api-keys.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def ask(service: Service, key: str, **body: Any) -> httpx.Response:
    heads = {"Authorization": f"Bearer {key}"}
    url = f"{service.url}/v1/chat/completions"
    return httpx.post(url, json=ASK | body, headers=heads, timeout=60)


def add_key(state: Path, name: str, *flags: str) -> str:
    done = run_tidegate("keys", "api", "add", str(state), name, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def rows(state: Path) -> list[dict[str, Any]]:
    with closing(UsageBook(state)) as book:
        return [exported(row) for row in book.rows(0, 1e12)]


def test_every_command_of_the_page_runs(tmp_path: Path, cloud_checkpoint: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "tidegate").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m tidegate.cli "$@"\n')
    (tools / "tidegate").chmod(0o755)
    commands = "\n".join(BLOCK.findall(PAGE)).replace(":8090", f":{free_port()}")
    commands = commands.replace("examples/assistant/cloud", str(cloud_checkpoint))
    done = subprocess.run(
        ["bash", "-c", f"set -eu\ntrap 'kill $(jobs -p) 2> jobs.log || true' EXIT\n{commands}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x-ratelimit-remaining-requests: 59" in done.stdout
    assert '"code":"insufficient_scope"' in done.stdout
    assert '"code":"key_revoked"' in done.stdout
    assert re.search(
        r"/v1/chat/completions,cloud,.*,200,ok,\d+,\d+,\d+,0\.\d{9}$", done.stdout, re.M
    )


def test_the_pages_numbers_are_ours() -> None:
    audit = AuditSettings()
    assert FLUSH_S == 1.0
    assert f"{MOST_WAITING:,}".replace(",", " ") in PAGE
    assert f"| {MOST_OF_A_SOURCE} wrong keys in a minute" in PAGE
    assert f"{audit.file_bytes >> 20} MiB" in PAGE
    assert f"`--audit-days` ({audit.keep_days:.0f})" in PAGE
    assert f"`--audit-mib` ({audit.keep_bytes >> 20})" in PAGE


def test_a_killed_service_returns_what_was_reserved_and_keeps_what_was_used(
    tmp_path: Path, cloud_checkpoint: Path
) -> None:
    state = tmp_path / "state"
    key = add_key(state, "team", "--quota-tokens-day", "3000", "--price-completion", "2")
    with Services(tmp_path) as services:
        first = services.cloud(cloud_checkpoint, "--state", str(state))
        used = ask(first, key).json()["usage"]
        until(lambda: len(rows(state)) == 1, "usage is written")
        heads = {"Authorization": f"Bearer {key}"}
        body = ASK | {"stream": True, "max_tokens": 1900, "ignore_eos": True}
        url = f"{first.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=heads, timeout=60) as answer:
            pieces = answer.iter_bytes()  # kept: its end would be the stream's
            assert next(pieces)
            # Nearly all of the day is reserved now, and dies with the process.
            refused = ask(first, key, max_tokens=1900)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "insufficient_quota"
            first.kill()
        second = services.cloud(cloud_checkpoint, "--state", str(state))
        assert ask(second, key, max_tokens=1900, stop=" ").status_code == 200
        (row, _) = _both(state)
        assert row["prompt_tokens"] == used["prompt_tokens"]
        assert row["cost"] == f"0.{used['completion_tokens'] * 2_000_000:09}"
        assert second.stop() == 0
    assert len(rows(state)) == 2


def _both(state: Path) -> list[dict[str, Any]]:
    until(lambda: len(rows(state)) == 2, "the second call is written")
    return rows(state)


def test_a_service_that_is_told_to_stop_writes_everything_first(
    tmp_path: Path, cloud_checkpoint: Path
) -> None:
    state = tmp_path / "state"
    key = add_key(state, "team")
    with Services(tmp_path) as services:
        service = services.cloud(cloud_checkpoint, "--state", str(state), "--log-format", "json")
        assert [ask(service, key).status_code for _ in range(3)] == [200] * 3
        assert service.stop() == 0
        lines = service.log.read_text().splitlines()
    assert all(json.loads(line)["level"] for line in lines)
    assert len(rows(state)) == 3
    audit = [json.loads(line) for line in (state / "audit.jsonl").read_text().splitlines()]
    assert [line["status"] for line in audit] == [200] * 3


def test_plain_keys_go_on_beside_keys_with_rules_and_metrics_may_need_one(
    tmp_path: Path, cloud_checkpoint: Path
) -> None:
    state, plain = tmp_path / "state", tmp_path / "keys.txt"
    made = run_tidegate("keys", "api")
    plain.write_text(made.stdout)
    old = made.stderr.split()[-1]
    chats, scrapes = (add_key(state, name, "--scope", name) for name in ("chat", "metrics"))
    with Services(tmp_path) as services:
        flags = ("--state", str(state), "--api-key-file", str(plain), "--metrics-need-key")
        service = services.cloud(cloud_checkpoint, *flags, "--metrics-per-key")
        assert [ask(service, key).status_code for key in (old, chats, scrapes)] == [200, 200, 403]

        def scrape(key: str | None) -> httpx.Response:
            heads = {} if key is None else {"Authorization": f"Bearer {key}"}
            return httpx.get(f"{service.url}/metrics", headers=heads)

        assert [scrape(key).status_code for key in (None, chats, scrapes, old)] == [
            401,
            403,
            200,
            200,
        ]
        text = scrape(scrapes).text
        assert 'tidegate_key_calls_total{key="chat",outcome="ok"} 1.0' in text
        assert 'tidegate_key_calls_total{key="api-key-file",outcome="ok"} 1.0' in text
        for key in (old, chats, scrapes):
            assert key not in text + service.log.read_text()


def test_the_openai_client_is_told_which_limit_it_hit(
    tmp_path: Path, cloud_checkpoint: Path
) -> None:
    state = tmp_path / "state"
    key = add_key(state, "team", "--requests", "1/hour")
    with Services(tmp_path) as services:
        service = services.cloud(cloud_checkpoint, "--state", str(state))
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)
        asking: Any = client.chat.completions
        asking.create(model="cloud", **ASK)
        with pytest.raises(openai.RateLimitError, match="1 requests in 3600 s") as told:
            asking.create(model="cloud", **ASK)
        assert told.value.code == "rate_limit_exceeded"
        wait_s = int(told.value.response.headers["retry-after"])
        assert 3500 < wait_s <= 3600
        run_tidegate("keys", "api", "revoke", str(state), "team")
        with pytest.raises(openai.AuthenticationError):
            asking.create(model="cloud", **ASK)
        client.close()


def test_the_openai_client_is_shown_and_given_what_its_key_may_use(
    tmp_path: Path, cloud_checkpoint: Path
) -> None:
    state = tmp_path / "state"
    scopes = ("--scope", "chat", "--scope", "models")
    other = add_key(state, "other", "--model", "elsewhere", *scopes)
    this = add_key(state, "this", "--model", "cloud", *scopes)
    with Services(tmp_path) as services:
        service = services.cloud(cloud_checkpoint, "--state", str(state))
        for key, listed in ((other, []), (this, ["cloud"])):
            with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as client:
                assert [card.id for card in client.models.list()] == listed
                with pytest.raises(openai.PermissionDeniedError) as refused:
                    client.completions.create(model="cloud", prompt="x")
                assert refused.value.code == "insufficient_scope"
                if not listed:
                    asking: Any = client.chat.completions
                    with pytest.raises(openai.PermissionDeniedError, match="name one of them"):
                        asking.create(model="cloud", **ASK)


def test_two_services_on_one_redis_spend_a_quota_once_and_refuse_without_it(
    tmp_path: Path, cloud_checkpoint: Path
) -> None:
    state = tmp_path / "state"
    limits = ("--quota-requests-day", "4", "--requests", "100/day/fixed", "--tokens", "9999/hour")
    key = add_key(state, "team", *limits)
    with redis_server(tmp_path) as redis, Services(tmp_path) as services:
        flags = ("--state", str(state), "--limits-redis", redis.url)
        pair = [services.cloud(cloud_checkpoint, *flags) for _ in range(2)]
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, pair[number % 2], key) for number in range(12)]
            told = sorted(one.result().status_code for one in asked)
        assert told == [200] * 4 + [429] * 8
        left = [ask(one, key).json()["error"]["message"] for one in pair]
        assert all("4 requests per day reached: 0 left" in one for one in left)
        redis.stop()
        refused = [ask(one, key) for one in pair]
        assert [(one.status_code, one.headers["retry-after"]) for one in refused] == [
            (503, "2")
        ] * 2
        assert all("Redis" in one.json()["error"]["message"] for one in refused)
        redis.start()
        # Counts of a Redis that keeps its log survive it.
        assert ask(pair[0], key).status_code == 429
        assert [one.stop() for one in pair] == [0, 0]
    assert len(rows(state)) == 4


def test_what_a_device_asks_over_the_link_is_in_the_books_by_its_handle(
    tmp_path: Path, bundle: Path, cloud_checkpoint: Path
) -> None:
    state, gateway = tmp_path / "state", tmp_path / "gateway"
    pair(tmp_path / "device", gateway)
    handle = load_device(tmp_path / "device").handle
    with Services(tmp_path) as services:
        made = Deployment(services=services, bundle=bundle, checkpoint=cloud_checkpoint)
        made.start_broker()
        link = ("--link", made.broker.url, "--keys", str(gateway), "--state", str(state))
        made.cloud = services.cloud(cloud_checkpoint, *link)
        made.start_device()
        made.ready()
        usage = ask_device(made.device, to_cloud(max_tokens=5))["usage"]
        until(lambda: len(rows(state)) == 1, "usage is written")
    (row,) = rows(state)
    assert (row["key_id"], row["key_name"]) == (f"device:{handle}", handle)
    assert (row["endpoint"], row["outcome"], row["status"]) == ("link", "ok", 200)
    assert row["prompt_tokens"] == usage["prompt_tokens"] > 0
    assert row["completion_tokens"] == 5
    log = (state / "audit.jsonl").read_text()
    (line,) = [line for line in map(json.loads, log.splitlines()) if line["source"] == "link"]
    assert (line["key_id"], line["client"]) == (f"device:{handle}", handle)
    assert SAID not in log
