"""The cloud on Ray, run for real: replicas killed under load, scaled up and down, a sealed request.

One cluster for all tests: two CPUs' worth, no dashboard, on loopback.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from deployment import reachable
from services import Service, Services, until
from streams import chat, streamed

from tidegate.link.fleet import pair

pytest.importorskip("ray", reason="the extra `ray` is not installed")
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.system, pytest.mark.timeout(500)]

SAID = "the confidential heron nests under the northern sluice, and nobody may know of it"


@dataclass(kw_only=True)
class Cluster:
    """A service on Ray, its broker, and a device that is paired with its gateway."""

    service: Service
    device: Service

    def engines(self) -> list[int]:
        """Process ids of the replicas."""
        family = psutil.Process(self.service.process.pid).children(recursive=True)
        found = []
        for one in family:
            try:
                if any("ServeReplica:tidegate:Engine" in word for word in one.cmdline()):
                    found.append(one.pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def busy_engine(self) -> int:
        """The process of a replica that runs something: any is asked until one does."""
        found: list[int] = []

        def looked() -> bool:
            told = self.service.get("/status")["replica"]
            found[:] = [int(told["pid"])] if told["running"] else []
            return bool(found)

        until(looked, "a replica is busy")
        return found[0]

    def front(self, name: str) -> int:
        """One of the counters of `/status`."""
        return int(self.service.get("/status")["front"][name])


@pytest.fixture(scope="module")
def cluster(
    bundle: Path, cloud_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    pair(folder / "device", folder / "gateway")
    with Services(folder) as services:
        broker = services.mosquitto()
        link = ("--link", broker.url, "--keys", str(folder / "gateway"))
        service = services.tidegate(
            "ray",
            *("ray", str(cloud_checkpoint), "--listen", "127.0.0.1:0", *link),
            *("--replicas", "3:4", "--cpus", "0.1", "--threads", "1", "--rows", "4"),
            *("--target-ongoing", "2", "--upscale-delay", "1", "--look-back", "2"),
            *("--downscale-delay", "3", "--drain", "10"),
            within_s=240.0,
        )
        keys = ("--link", broker.url, "--keys", str(folder / "device"))
        made = Cluster(service=service, device=services.serve(bundle, *keys))
        until(lambda: len(made.engines()) >= 3, "three replicas run", within_s=60)
        yield made


def whole(cluster: Cluster, body: dict[str, object]) -> str:
    """An answer that is not streamed."""
    url = f"{cluster.service.url}/v1/chat/completions"
    response = httpx.post(url, json=body, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def stream_to_end(cluster: Cluster, body: dict[str, object]) -> str:
    with streamed(cluster.service.url, body, timeout_s=120) as stream:
        stream.read()
        assert stream.done
    return stream.text


def bodies(count: int, *, tokens: int) -> list[dict[str, object]]:
    """Greedy: who draws near a boundary may draw otherwise in another batch."""
    return [chat(f"number {n} of them", max_tokens=tokens, ignore_eos=True) for n in range(count)]


def test_answers_are_the_same_whoever_gives_them(cluster: Cluster) -> None:
    body = chat("the same", max_tokens=12, ignore_eos=True)
    assert len({whole(cluster, body) for _ in range(6)}) == 1
    assert stream_to_end(cluster, body) == whole(cluster, body)


def test_the_same_beginning_is_found_in_a_cache(cluster: Cluster) -> None:
    """By any of three engines it would be computed anew most times."""
    cached = []
    for last in range(5):
        said = "a long and common beginning " * 8 + f"and question {last}"
        url = f"{cluster.service.url}/v1/chat/completions"
        answer = httpx.post(url, json=chat(said, max_tokens=2), timeout=60).json()
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] < 100
    assert min(cached[1:]) > 200


def test_a_client_that_leaves_frees_its_place_in_the_engine(cluster: Cluster) -> None:
    with streamed(cluster.service.url, chat("on and on", max_tokens=1500, ignore_eos=True)) as one:
        one.read(3)
    # The replica that is asked for numbers is any of them: all must be idle.
    until(
        lambda: all(cluster.service.get("/status")["replica"]["running"] == 0 for _ in range(6)),
        "no replica runs anything",
        within_s=10,
    )


def test_a_replica_is_killed_under_load_and_nothing_is_lost(cluster: Cluster) -> None:
    asked = bodies(9, tokens=150)
    expected = [whole(cluster, body) for body in asked]
    rerun = cluster.front("rerun")
    with ThreadPoolExecutor(len(asked)) as pool:
        streams = [pool.submit(stream_to_end, cluster, body) for body in asked]
        victim = cluster.busy_engine()
        os.kill(victim, signal.SIGKILL)
        got = [one.result(200) for one in streams]
    assert got == expected
    assert cluster.front("rerun") > rerun
    assert cluster.front("lost") == 0
    until(lambda: len(set(cluster.engines()) - {victim}) >= 3, "it is replaced", within_s=60)


def test_load_brings_a_replica_and_idleness_takes_it(cluster: Cluster) -> None:
    until(lambda: len(cluster.engines()) == 3, "back to the least", within_s=90)
    asked = bodies(16, tokens=400)
    with ThreadPoolExecutor(len(asked)) as pool:
        streams = [pool.submit(stream_to_end, cluster, body) for body in asked]
        until(lambda: len(cluster.engines()) == 4, "a fourth replica runs", within_s=60)
        assert all(len(one.result(200)) > 100 for one in streams)
    until(lambda: len(cluster.engines()) == 3, "back to three", within_s=90)


def test_a_sealed_request_is_answered_through_the_gateway(cluster: Cluster) -> None:
    until(lambda: reachable(cluster.device), "the route to the cloud opens", within_s=60)
    body = chat(SAID, max_tokens=40, ignore_eos=True, tidegate={"route": "cloud"})
    response = httpx.post(f"{cluster.device.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["tidegate"]["route"] == "cloud"
    plain = {name: value for name, value in body.items() if name != "tidegate"}
    assert answer["choices"][0]["message"]["content"] == whole(cluster, plain)


def test_a_sealed_request_survives_its_replica(cluster: Cluster) -> None:
    body = chat(SAID, max_tokens=300, ignore_eos=True)
    expected = whole(cluster, body)
    with streamed(cluster.device.url, {**body, "tidegate": {"route": "cloud"}}) as stream:
        stream.read(5)
        os.kill(cluster.busy_engine(), signal.SIGKILL)
        stream.read()
    assert stream.done
    assert stream.text == expected


def test_bad_calls_are_refused_as_by_one_process(cluster: Cluster) -> None:
    url = f"{cluster.service.url}/v1/chat/completions"
    wrong = httpx.post(url, json={"messages": []}, timeout=30)
    assert wrong.status_code == 400
    assert wrong.json()["error"]["code"] == "invalid_request"
    unknown = httpx.post(url, json={**chat("x"), "model": "other"}, timeout=30)
    assert unknown.status_code == 404
    long = httpx.post(url, json=chat("x" * 9000, max_tokens=4), timeout=30)
    assert long.status_code == 413
