"""API keys over HTTP: who comes in, what a call takes from its limits, and what returns."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from echobackend import EchoBackend
from handembedder import LetterEmbedder, VowelClassifier
from keyedapp import CHAT, HELLO, Clock, Keyed, keyed

from tidegate.api.backend import AnswerEvent
from tidegate.api.encoders import Encoders
from tidegate.api.http import create_app
from tidegate.api.keys import new_key
from tidegate.api.schema import Call
from tidegate.api.settings import HttpSettings
from tidegate.cloud.charges import Taken
from tidegate.cloud.key_rules import Prices, Quota, Rate
from tidegate.cloud.limits_of_keys import Ask, charges_of
from tidegate.cloud.usage import exported
from tidegate.engine.events import Failed
from tidegate.errors import CapacityError, LinkError

ENCODERS = Encoders(embedders=(LetterEmbedder(),), classifiers=(VowelClassifier(),))
PER_DAY = Quota(unit="tokens", period="day", amount=100)
BUCKET = Rate(unit="tokens", amount=60, window_s=60)


def run(
    folder: Path,
    test: Callable[[Keyed], Awaitable[None]],
    *,
    clock: Clock | None = None,
    **how: Any,
) -> None:
    async def main() -> None:
        async with keyed(folder, clock=clock or Clock(), **how) as world:
            await test(world)

    asyncio.run(main())


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def used(world: Keyed) -> list[dict[str, Any]]:
    world.access.usage.flush()
    return [exported(row) for row in world.access.usage.rows(0, 1e12)]


def test_a_key_opens_what_its_scopes_say_and_nothing_else(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(scopes=("chat",))
        heads = {"Authorization": f"Bearer {key}"}
        assert (await world.chat(key)).status_code == 200
        for path in ("/v1/models", "/status", "/nowhere"):
            refused = await world.client.get(path, headers=heads)
            assert error_of(refused) == (403, "insufficient_scope")
        assert (await world.client.get("/health")).status_code == 200

    run(tmp_path, test)


def test_no_key_a_wrong_one_and_one_too_long_to_be_one_are_refused_alike(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        world.add()
        for key in (None, "", new_key(), "x" * 30_000):
            refused = await world.chat(key)
            assert error_of(refused) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"

    run(tmp_path, test)


def test_revoked_and_expired_keys_open_nothing_from_the_next_request_on(tmp_path: Path) -> None:
    clock = Clock()

    async def test(world: Keyed) -> None:
        record, key = world.add()
        _, short = world.access.keys.add(
            "short", record.rules, now_s=clock(), expires_s=clock() + 60
        )
        assert (await world.chat(key)).status_code == (await world.chat(short)).status_code == 200
        world.access.keys.revoke("team", now_s=clock())
        clock.now_s += 60
        assert error_of(await world.chat(key)) == (401, "key_revoked")
        assert error_of(await world.chat(short)) == (401, "key_expired")

    run(tmp_path, test, clock=clock)


def test_trying_keys_is_listened_to_thirty_times_a_minute_and_a_good_one_still_passes(
    tmp_path: Path,
) -> None:
    clock = Clock()

    async def test(world: Keyed) -> None:
        _, key = world.add()
        told = [(await world.chat(new_key())).status_code for _ in range(33)]
        assert told == [401] * 30 + [429] * 3
        assert (await world.chat(key)).status_code == 200
        world.access.audit.flush()  # type: ignore[union-attr]
        assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 31
        clock.now_s += 60
        assert (await world.chat(new_key())).status_code == 401

    run(tmp_path, test, clock=clock)


def test_a_key_may_use_the_models_that_it_lists(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, other = world.add(models=("another-1",))
        _, this = world.add("this", models=("echo-1",))
        assert error_of(await world.chat(other)) == (403, "access_denied")
        assert (await world.chat(this, model="echo-1")).status_code == 200
        assert used(world)[0]["model"] == "echo-1"

    run(tmp_path, test)


def test_what_a_call_did_not_use_returns_to_its_bucket_and_its_quota(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(BUCKET,), quotas=(PER_DAY,))
        answer = await world.chat(key, max_tokens=50)  # reserves 53, uses 6
        assert answer.headers["x-ratelimit-remaining-tokens"] == "7"
        assert answer.headers["x-ratelimit-limit-tokens"] == "60"
        assert answer.headers["x-ratelimit-reset-tokens"] == "53s"
        again = await world.chat(key, max_tokens=50)
        assert again.headers["x-ratelimit-remaining-tokens"] == "1"

    run(tmp_path, test)


def test_a_refusal_says_which_limit_and_when_to_come_back(tmp_path: Path) -> None:
    clock = Clock()

    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(BUCKET,))
        for _ in range(2):
            assert (await world.chat(key, max_tokens=50)).status_code == 200
        assert (await world.chat(key, max_tokens=40)).status_code == 200
        refused = await world.chat(key, max_tokens=50)  # 42 of 53
        assert error_of(refused) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "11"
        assert refused.headers["x-ratelimit-remaining-tokens"] == "42"
        assert "60 tokens in 60 s (bucket)" in refused.json()["error"]["message"]
        clock.now_s += 11
        assert (await world.chat(key, max_tokens=50)).status_code == 200

    run(tmp_path, test, clock=clock)


def test_what_could_never_fit_is_refused_for_good_and_names_the_field(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(BUCKET,))
        refused = await world.chat(key)  # the rest of the context, by default
        assert refused.status_code == 413
        assert refused.json()["error"]["param"] == "max_tokens"

    run(tmp_path, test)


def test_a_quota_is_told_before_a_rate_and_ends_at_midnight(tmp_path: Path) -> None:
    clock = Clock()

    async def test(world: Keyed) -> None:
        quota = Quota(unit="requests", period="day", amount=1)
        rate = Rate(unit="requests", amount=1, window_s=3600)
        _, key = world.add(rates=(rate,), quotas=(quota,))
        assert (await world.chat(key)).status_code == 200
        refused = await world.chat(key)
        assert error_of(refused) == (429, "insufficient_quota")
        midnight_s = 1_700_006_400
        assert int(refused.headers["retry-after"]) == midnight_s - clock()
        clock.now_s = midnight_s - 0.001
        assert error_of(await world.chat(key)) == (429, "insufficient_quota")
        clock.now_s = midnight_s
        assert (await world.chat(key)).status_code == 200

    run(tmp_path, test, clock=clock)


@pytest.mark.parametrize(
    ("backend", "status", "outcome"),
    [
        (EchoBackend(refuse=CapacityError("full")), 429, None),
        (EchoBackend(break_after=0, breaking=RuntimeError("no")), 500, "failed"),
        (
            EchoBackend(
                break_after=1, breaking=Failed(code="unavailable", message="", retryable=True)
            ),
            503,
            "failed",
        ),
        (EchoBackend(break_after=1), 500, "failed"),
    ],
    ids=["refused", "raised", "failed", "broke off"],
)
def test_a_call_that_failed_costs_no_tokens_and_one_never_begun_not_even_a_request(
    tmp_path: Path, backend: EchoBackend, status: int, outcome: str | None
) -> None:
    async def test(world: Keyed) -> None:
        quota = Quota(unit="requests", period="day", amount=1)
        _, key = world.add(rates=(BUCKET,), quotas=(PER_DAY, quota), prices=Prices(prompt=7))
        assert (await world.chat(key, max_tokens=50)).status_code == status
        rows = used(world)
        assert [row["outcome"] for row in rows] == ([] if outcome is None else [outcome])
        assert all(row["cost"] == "0.000000000" for row in rows)
        world.backend.refuse = world.backend.break_after = None
        again = await world.chat(key, max_tokens=50)
        assert again.status_code == (200 if outcome is None else 429)
        if outcome is None:
            assert again.headers["x-ratelimit-remaining-tokens"] == "7"

    run(tmp_path, test, backend=backend)


async def leave_after(world: Keyed, key: str, word: bytes) -> None:
    """Ask for a stream, and hang up when `word` has come; b"" hangs up at once."""
    body = json.dumps(HELLO | {"stream": True, "max_tokens": 50}).encode()
    asked, heard = False, asyncio.Event()
    if not word:
        heard.set()

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body}
        await heard.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if word and word in message.get("body", b""):
            heard.set()

    heads = [
        (b"authorization", f"Bearer {key}".encode()),
        (b"content-type", b"application/json"),
    ]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": heads}
    await world.app({**scope, "query_string": b"", "client": ("10.0.0.1", 1)}, receive, send)


def test_a_client_that_leaves_pays_for_the_prompt_and_what_was_said(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(BUCKET,), prices=Prices(prompt=1000, completion=2000))
        await leave_after(world, key, b" two")
        (row,) = used(world)
        assert (row["outcome"], row["prompt_tokens"], row["completion_tokens"]) == ("aborted", 3, 2)
        assert row["cost"] == "0.000007000"
        left = (await world.chat(key, max_tokens=50)).headers["x-ratelimit-remaining-tokens"]
        assert left == "2"

    run(tmp_path, test, backend=EchoBackend(word_s=0.02))


class Moody(EchoBackend):
    """Every third answer breaks off, every seventh call is refused."""

    def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        number = len(self.calls)
        self.calls.append(call)
        mood = EchoBackend(
            word_s=self.word_s,
            refuse=CapacityError("full") if number % 7 == 6 else None,
            break_after=1 if number % 3 == 2 else None,
        )
        return mood.answer(call)


def test_after_a_crowd_of_every_kind_nothing_stays_reserved_and_the_books_agree(
    tmp_path: Path,
) -> None:
    clock = Clock()

    async def test(world: Keyed) -> None:
        quotas = (
            Quota(unit="tokens", period="day", amount=2_000),
            Quota(unit="requests", period="day", amount=1_000),
        )
        record, key = world.add(quotas=quotas)
        crowd: list[Awaitable[object]] = []
        for number in range(160):
            match number % 5:
                case 0:
                    crowd.append(leave_after(world, key, (b"", b"one", b" two")[number % 3]))
                case 1:
                    crowd.append(world.chat(key, max_tokens="many"))
                case 2:
                    crowd.append(world.chat(key, max_tokens=50, stream=True))
                case _:
                    crowd.append(world.chat(key, max_tokens=50, n=1 + number % 2))
        await asyncio.gather(*crowd)
        outcomes = {row["outcome"] for row in used(world)}
        assert outcomes == {"ok", "aborted", "failed"}
        booked = world.access.usage.since(record.id, 0)
        charges = charges_of(record.rules, Ask(tokens=0), clock())
        none = tuple(replace(charge, amount=0) for charge in charges)
        taken = await world.access.ledger.take(record.id, "look", none)
        assert taken == Taken(left=(2_000 - booked.tokens, 1_000 - booked.requests))

    run(tmp_path, test, clock=clock, backend=Moody(word_s=0.003))


def test_several_answers_are_reserved_together_and_their_prompt_is_paid_once(
    tmp_path: Path,
) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(BUCKET,))
        answer = await world.chat(key, n=3, max_tokens=10)
        assert answer.headers["x-ratelimit-remaining-tokens"] == "27"
        (row,) = used(world)
        assert (row["prompt_tokens"], row["completion_tokens"]) == (3, 9)

    run(tmp_path, test)


def test_a_restarted_service_goes_on_counting_quotas_where_it_was(tmp_path: Path) -> None:
    clock, keys = Clock(), []

    async def first(world: Keyed) -> None:
        keys.append(world.add(quotas=(PER_DAY,))[1])
        for _ in range(3):
            assert (await world.chat(keys[0], max_tokens=50)).status_code == 200

    async def second(world: Keyed) -> None:
        assert (await world.chat(keys[0], max_tokens=80)).status_code == 429  # 82 left
        assert (await world.chat(keys[0], max_tokens=79)).status_code == 200

    run(tmp_path, first, clock=clock)
    run(tmp_path, second, clock=clock)


def test_a_second_service_on_the_same_folder_is_refused_without_redis(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        with pytest.raises(LinkError, match="another process"):
            async with keyed(tmp_path):
                pass

    run(tmp_path, test)


def test_calls_at_the_same_time_never_spend_more_than_there_is(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(quotas=(PER_DAY,))
        answers = await asyncio.gather(*(world.chat(key, max_tokens=22) for _ in range(12)))
        told = sorted(answer.status_code for answer in answers)
        assert told == [200] * 4 + [429] * 8  # 25 reserved each

    run(tmp_path, test, backend=EchoBackend(word_s=0.01))


def test_the_audit_log_has_who_and_what_and_no_word_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def test(world: Keyed) -> None:
        record, key = world.add(quotas=(PER_DAY,))
        answer = await world.chat(key, max_tokens=50)
        await world.chat(key, max_tokens=99)
        await world.chat("tg-" + "guessed")
        await world.access.flush()
        text = (tmp_path / "audit.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["key_id"] for line in lines] == [record.id, record.id, None]
        assert [line["status"] for line in lines] == [200, 413, 401]
        assert lines[0]["path"] == CHAT
        assert lines[0]["completion_tokens"] == 3
        assert lines[0]["request_id"] == answer.headers["x-request-id"]
        assert lines[2]["refused"] == "invalid_api_key"
        everything = text + caplog.text + world.access.metrics.render().decode() + repr(record)
        for secret in (key, key[3:20], "guessed", "one two three"):
            assert secret not in everything
        assert key.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())

    run(tmp_path, test)


def test_metrics_name_keys_only_where_that_was_asked_for(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add("team-seven")
        await world.chat(key)
        await world.chat(None)
        text = world.access.metrics.render().decode()
        assert ("team-seven" in text) is world.access.metrics.per_key
        assert 'tidegate_access_refused_total{reason="invalid_api_key"} 1.0' in text

    run(tmp_path / "a", test)
    run(tmp_path / "b", test, metrics_per_key=True)


def test_a_month_ends_with_its_last_millisecond(tmp_path: Path) -> None:
    last_s = 1_701_388_799.999  # 2023-11-30T23:59:59.999Z
    clock = Clock(last_s - 100)

    async def test(world: Keyed) -> None:
        _, key = world.add(quotas=(Quota(unit="requests", period="month", amount=1),))
        assert (await world.chat(key)).status_code == 200
        clock.now_s = last_s
        refused = await world.chat(key)
        assert error_of(refused) == (429, "insufficient_quota")
        assert refused.headers["retry-after"] == "1"
        clock.now_s += 0.001
        assert (await world.chat(key)).status_code == 200

    run(tmp_path, test, clock=clock)


def test_a_call_astride_midnight_belongs_to_the_day_that_it_began_in(tmp_path: Path) -> None:
    midnight_s = 1_700_006_400
    clock = Clock(midnight_s - 1.0)

    async def test(world: Keyed) -> None:
        _, key = world.add(quotas=(PER_DAY,))
        asking = asyncio.create_task(world.chat(key, max_tokens=50))
        while not world.backend.begun:
            await asyncio.sleep(0.005)
        clock.now_s = midnight_s
        assert (await asking).status_code == 200
        # Nothing of it was returned to, or is missing from, the new day.
        assert (await world.chat(key, max_tokens=97)).status_code == 200
        assert (await world.chat(key, max_tokens=92)).status_code == 429
        assert (await world.chat(key, max_tokens=91)).status_code == 200
        began = [row["began_s"] for row in used(world)]
        assert began == [midnight_s - 1, midnight_s, midnight_s]

    run(tmp_path, test, clock=clock, backend=EchoBackend(word_s=0.03))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/classify", "/v1/classify"])
def test_encoders_calls_reserve_the_most_that_their_texts_can_be_and_pay_what_they_are(
    path: str, tmp_path: Path
) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(BUCKET,), prices=Prices(prompt=1_000_000))
        app = create_app(
            world.backend, settings=HttpSettings(admission=world.access), encoders=ENCODERS
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def embed(text: str) -> httpx.Response:
                heads = {"Authorization": f"Bearer {key}"}
                return await client.post(path, json={"input": text}, headers=heads)

            answer = await embed("ten letters are here")
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-remaining-tokens"] == "38"
            (row,) = used(world)
            assert row["endpoint"] == path
            assert row["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
            assert row["cost"] == f"{row['prompt_tokens'] / 1000:.9f}"
            refused = await embed("x" * 59)
            assert refused.status_code == 413
            assert refused.json()["error"]["param"] == "input"

    run(tmp_path, test)


def test_classification_has_a_scope_of_its_own(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(scopes=("embeddings",))
        settings = HttpSettings(admission=world.access)
        app = create_app(world.backend, settings=settings, encoders=ENCODERS)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            heads = {"Authorization": f"Bearer {key}"}
            allowed = await client.post("/v1/embeddings", json={"input": "a"}, headers=heads)
            refused = await client.post("/classify", json={"input": "a"}, headers=heads)
        assert (allowed.status_code, refused.status_code) == (200, 403)
        assert "lacks the scope 'classify'" in refused.text

    run(tmp_path, test)
