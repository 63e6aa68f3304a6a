"""Eight clients at once get what a limit says over HTTP, within 2 %; so do two replicas."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from keyedapp import CHAT, HELLO, serving_keyed
from redisserver import redis_server
from services import until

from tidegate.cloud.api_keys import ApiKeyStore
from tidegate.cloud.key_rules import KeyRules, Quota, Rate
from tidegate.cloud.usage import UsageBook

pytestmark = pytest.mark.system

CLIENTS = 8
LASTS_S = 3.6
TOLERANCE = 0.02
USED_TOKENS = 6  # three words asked, three said


@dataclass(frozen=True)
class Granted:
    """When the granted calls were asked and answered, and from when to when all clients asked."""

    asked_s: tuple[float, ...]
    answered_s: tuple[float, ...]
    refused: int
    began_s: float
    ended_s: float


def hammer(
    urls: list[str], key: str, *, lasts_s: float = LASTS_S, aligned: bool = False, **body: Any
) -> Granted:
    """Ask as fast as eight clients can; `aligned` begins with a second of the clock."""
    granted: list[tuple[float, float]] = []
    others: list[int] = []
    times: list[float] = []

    def begin() -> None:
        if aligned:
            time.sleep(1 - time.time() % 1)
        times.extend((time.time(), time.time() + lasts_s))

    together = threading.Barrier(CLIENTS, action=begin)

    def client(url: str) -> None:
        heads = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, headers=heads, timeout=20) as http:
            together.wait()
            while time.time() < times[1]:
                before_s = time.time()
                answer = http.post(CHAT, json={**HELLO, **body})
                if answer.status_code == 200:
                    granted.append((before_s, time.time()))
                else:
                    others.append(answer.status_code)
                    assert int(answer.headers["retry-after"]) >= 1
                    time.sleep(0.01)

    threads = [
        threading.Thread(target=client, args=(urls[number % len(urls)],))
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(others) <= {429}
    granted.sort(key=lambda one: one[1])
    return Granted(
        asked_s=tuple(asked for asked, _ in granted),
        answered_s=tuple(answered for _, answered in granted),
        refused=len(others),
        began_s=times[0],
        ended_s=times[1],
    )


@pytest.fixture(params=["one in memory", "two on Redis"])
def replicas(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """The state folder and the URLs of the services that share it."""
    pytest.importorskip("limits", reason="the library of windows is not installed")
    with ExitStack() as stack:
        state = tmp_path / "state"
        if request.param == "one in memory":
            urls = [stack.enter_context(serving_keyed(state))]
        else:
            server = stack.enter_context(redis_server(tmp_path))
            two = (serving_keyed(state, redis=server.url) for _ in range(2))
            urls = [stack.enter_context(one) for one in two]
        yield state, urls


def given_in_full(attempt: Callable[[], tuple[float, float, float]]) -> None:
    """Hold what was granted against the most and the least: never above, once in three not below.

    Clients whose machine is busy with others may ask too seldom to get all that they could.
    """
    for _ in range(3):
        granted, least, most = attempt()
        print(f"{granted:g} of {least:.1f} to {most:.1f}")
        assert granted <= most * (1 + TOLERANCE)
        if granted >= least * (1 - TOLERANCE):
            return
    pytest.fail("eight clients never got what the limit gives")


def flowing_s(run: Granted) -> tuple[float, float]:
    """For how long a bucket was filled while clients asked: at least, and at most."""
    return run.ended_s - run.answered_s[0], max(run.answered_s) - min(run.asked_s)


def new_key(state: Path, **rules: Any) -> str:
    with closing(ApiKeyStore(state)) as store:
        name = f"team-{len(store.keys())}"  # each attempt has a key of its own
        return store.add(name, KeyRules(**rules), now_s=time.time())[1]


def test_a_bucket_gives_what_it_holds_and_what_flows_in(
    replicas: tuple[Path, list[str]],
) -> None:
    state, urls = replicas
    rate = Rate(unit="requests", amount=60, window_s=1)

    def attempt() -> tuple[float, float, float]:
        run = hammer(urls, new_key(state, rates=(rate,)))
        least_s, most_s = flowing_s(run)
        return len(run.answered_s), 60 + 60 * least_s, 60 + 60 * most_s

    given_in_full(attempt)


def test_tokens_that_were_reserved_and_not_used_are_spent_by_others(
    replicas: tuple[Path, list[str]],
) -> None:
    state, urls = replicas
    rate = Rate(unit="tokens", amount=360, window_s=1)

    def attempt() -> tuple[float, float, float]:
        run = hammer(urls, new_key(state, rates=(rate,)), max_tokens=7)
        least_s, most_s = flowing_s(run)
        tokens = USED_TOKENS * len(run.answered_s)
        return tokens, 360 + 360 * least_s, 360 + 360 * most_s

    given_in_full(attempt)


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_a_fixed_window_gives_its_amount_in_each(
    replicas: tuple[Path, list[str]], unit: str
) -> None:
    state, urls = replicas
    amount = 20 if unit == "requests" else 20 * USED_TOKENS
    rate = Rate(unit=unit, amount=amount, window_s=1, strategy="fixed")  # type: ignore[arg-type]

    def attempt() -> tuple[float, float, float]:
        # It begins with a window and sees four: the last one for long enough to use it up.
        run = hammer(urls, new_key(state, rates=(rate,)), max_tokens=3, aligned=True)
        return len(run.answered_s), 80, 80

    given_in_full(attempt)


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_a_sliding_window_gives_its_amount_in_any_stretch(
    replicas: tuple[Path, list[str]], unit: str
) -> None:
    state, urls = replicas
    amount = 20 if unit == "requests" else 20 * USED_TOKENS
    rate = Rate(unit=unit, amount=amount, window_s=2, strategy="sliding")  # type: ignore[arg-type]

    def attempt() -> tuple[float, float, float]:
        # Four windows' amounts, the last with more than half a window for what came late before.
        run = hammer(urls, new_key(state, rates=(rate,)), lasts_s=7.2, max_tokens=3)
        pairs = zip(sorted(run.asked_s), run.answered_s[20:], strict=False)
        assert all(later - first >= rate.window_s for first, later in pairs)
        return len(run.answered_s), 80, 80

    given_in_full(attempt)


def test_a_quota_is_spent_to_the_last_request_and_not_beyond(
    replicas: tuple[Path, list[str]],
) -> None:
    state, urls = replicas
    quotas = (
        Quota(unit="requests", period="month", amount=100),
        Quota(unit="tokens", period="month", amount=10_000),
    )
    run = hammer(urls, new_key(state, quotas=quotas), lasts_s=3, max_tokens=3)
    assert len(run.answered_s) == 100
    assert run.refused > 0
    with closing(UsageBook(state)) as book:

        def written() -> int:
            return sum(
                book.since(key, 0).tokens for key in {row.key_id for row in book.rows(0, 1e12)}
            )

        until(lambda: written() >= 100 * USED_TOKENS, "usage is written, each second")
        assert written() == 100 * USED_TOKENS
        assert len({row.key_id for row in book.rows(0, 1e12)}) == 1
