"""A deployment of real processes: mosquitto, a cloud with its gateway, devices that overflow to it.

Whatever is killed meanwhile, the answer that a client reads is the one that the cloud gives when
asked directly: complete, and every word of it once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as paho
import pytest
from deployment import LONG, SAID, Deployment, ask, directly, reachable, text_of, to_cloud
from paho.mqtt.enums import CallbackAPIVersion
from services import STOP_S, Services, run_tidegate, until
from streams import chat, streamed

from tidegate.link.fleet import add_device, pair

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def deployment(
    bundle: Path, cloud_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    pair(folder / "device", folder / "gateway")
    with Services(folder) as services:
        made = Deployment(services=services, bundle=bundle, checkpoint=cloud_checkpoint)
        made.start_broker()
        made.start_cloud()
        made.start_device()
        made.ready()
        yield made


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> str:
    """The long answer, asked at the cloud directly."""
    return directly(deployment, to_cloud())


@dataclass(kw_only=True)
class Eavesdropper:
    """A client of the broker that subscribed to everything."""

    topics: list[str] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum("/q/" in topic for topic in self.topics)


@contextmanager
def eavesdropping(port: int) -> Iterator[Eavesdropper]:
    heard = Eavesdropper()
    subscribed: list[int] = []

    def on_message(client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        heard.topics.append(message.topic)
        heard.payloads.append(bytes(message.payload))

    def on_subscribe(client: Any, userdata: Any, mid: int, codes: Any, properties: Any) -> None:
        subscribed.append(mid)

    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_message, client.on_subscribe = on_message, on_subscribe
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        client.subscribe("#", qos=1)
        until(lambda: bool(subscribed), "the subscription stands")
        yield heard
    finally:
        client.disconnect()
        client.loop_stop()


def test_who_reads_everything_on_the_broker_reads_no_word(deployment: Deployment) -> None:
    body = to_cloud(max_tokens=80)
    with eavesdropping(deployment.port) as heard:
        answer = ask(deployment.device, body)
        until(lambda: heard.requests > 0, "the request was seen")
    assert answer["tidegate"]["route"] == "cloud"
    assert text_of(answer) == directly(deployment, body)
    wire = b"\n".join([*(topic.encode() for topic in heard.topics), *heard.payloads]).lower()
    words = {word for word in (*SAID.split(), *text_of(answer).split()) if len(word) > 4}
    assert len(words) > 30
    assert [word for word in words if word.encode() in wire] == []
    assert b"seed" not in wire
    assert b"messages" not in wire


def test_what_is_local_never_meets_the_broker(deployment: Deployment) -> None:
    with eavesdropping(deployment.port) as heard:
        answer = ask(
            deployment.device, chat("mind the tide", max_tokens=4, tidegate={"privacy": "local"})
        )
        assert answer["tidegate"]["route"] == "edge"
        refused = httpx.post(
            f"{deployment.device.url}/v1/chat/completions",
            json=chat("mind the tide", tidegate={"privacy": "local", "route": "cloud"}),
            timeout=10,
        )
        assert refused.status_code == 422
        assert "never leaves the device" in refused.json()["error"]["message"]
        # A request that may leave is the barrier: what was sent before it would have come too.
        ask(deployment.device, to_cloud(max_tokens=2))
        until(lambda: heard.requests > 0, "the request that may leave was seen")
    request_topics = [topic for topic in heard.topics if "/q/" in topic]
    assert len(set(request_topics)) == 1
    sizes = [
        len(payload)
        for topic, payload in zip(heard.topics, heard.payloads, strict=True)
        if topic in request_topics and len(payload) > 250
    ]
    assert len(sizes) == 1, "one request went out, the rest is acknowledgements"


def test_a_prompt_too_long_for_the_cloud_is_told_as_such(deployment: Deployment) -> None:
    response = httpx.post(
        f"{deployment.device.url}/v1/chat/completions",
        json=to_cloud("tide " * 600),
        timeout=20,
    )
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert "too long for the cloud" in error["message"]
    assert "2048" in error["message"]


def test_a_client_that_hangs_up_frees_the_cloud(deployment: Deployment) -> None:
    with streamed(deployment.device.url, to_cloud(max_tokens=1500)) as stream:
        stream.read(5)
        assert deployment.cloud.running == 1
    until(lambda: deployment.cloud.running == 0, "the cloud is free", within_s=3)


def test_two_devices_get_their_own_answers(deployment: Deployment) -> None:
    folder = deployment.folder
    add_device(folder / "gateway" / "fleet", folder / "second", [folder / "gateway"])
    second = deployment.another_device("second")
    deployment.ready(second)
    # Short, because they run in one batch here and alone below: float rounding of the two differs
    # by 1e-4 logits in this deep random model and may turn one draw in tens of thousands.
    bodies = [to_cloud(f"{SAID}, says device {n}", max_tokens=24) for n in range(4)]
    homes = [deployment.device, second, deployment.device, second]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, homes, bodies))
    assert [one["tidegate"]["route"] for one in answers] == ["cloud"] * 4
    texts = [text_of(one) for one in answers]
    assert texts == [directly(deployment, body) for body in bodies]
    assert len(set(texts)) == 4
    assert second.stop() == 0


def test_a_device_changes_its_signing_key_while_it_streams(
    deployment: Deployment, expected: str
) -> None:
    folder = deployment.folder / "device"
    before = (folder / "device.key").read_bytes()
    with streamed(deployment.device.url, to_cloud()) as stream:
        stream.read(5)
        done = run_tidegate("keys", "rotate", "device", str(folder))
        assert done.returncode == 0, done.stderr
        stream.read()
    assert stream.text == expected
    until(lambda: not (folder / "device.next.key").exists(), "the key is replaced")
    assert (folder / "device.key").read_bytes() != before
    assert ask(deployment.device, to_cloud(max_tokens=9))["tidegate"]["route"] == "cloud"


def test_an_answer_survives_the_death_of_the_broker(deployment: Deployment, expected: str) -> None:
    with streamed(deployment.device.url, to_cloud()) as stream:
        stream.read(40)
        deployment.broker.kill()
        until(lambda: not reachable(deployment.device), "the device notices")
        assert not stream.done
        deployment.start_broker(deployment.port)
        stream.read()
    assert stream.done
    assert stream.route == "cloud"
    assert stream.text == expected
    assert stream.usage["completion_tokens"] == LONG


def test_an_answer_survives_the_death_of_the_cloud(deployment: Deployment, expected: str) -> None:
    deployment.ready()
    with streamed(deployment.device.url, to_cloud()) as stream:
        stream.read(40)
        deployment.cloud.kill()
        deployment.start_cloud()
        stream.read()
    assert stream.done
    assert stream.text == expected
    assert stream.usage["completion_tokens"] == LONG


def test_a_cloud_that_is_told_to_stop_first_ends_what_it_streams(deployment: Deployment) -> None:
    deployment.ready()
    body = to_cloud(max_tokens=300)
    whole = directly(deployment, body)
    with streamed(deployment.device.url, body) as stream:
        stream.read(10)
        assert deployment.cloud.stop() == 0
        stream.read()
    assert stream.text == whole
    deployment.start_cloud()


def test_a_device_that_is_told_to_stop_first_ends_what_comes_from_the_cloud(
    deployment: Deployment,
) -> None:
    deployment.ready()
    body = to_cloud(max_tokens=200)
    whole = directly(deployment, body)
    with streamed(deployment.device.url, body) as stream:
        stream.read(10)
        deployment.device.process.send_signal(signal.SIGTERM)
        stream.read()
    assert stream.text == whole
    assert deployment.device.process.wait(STOP_S) == 0
    deployment.start_device()


def test_a_device_that_died_comes_back_and_leaves_nothing_running(deployment: Deployment) -> None:
    deployment.ready()
    with streamed(deployment.device.url, to_cloud()) as stream:
        stream.read(20)
        deployment.device.kill()
        with pytest.raises(httpx.HTTPError):
            stream.read()
    deployment.start_device()
    assert deployment.device.get("/health")["healthy"]
    deployment.ready()
    until(lambda: deployment.cloud.running == 0, "the cloud is free", within_s=30)
    answer = ask(deployment.device, to_cloud(max_tokens=20))
    assert answer["tidegate"]["route"] == "cloud"
    assert text_of(ask(deployment.device, chat("hello", max_tokens=4)))


def test_without_a_broker_the_device_answers_itself_until_one_appears(
    deployment: Deployment,
) -> None:
    port = deployment.port
    assert deployment.device.stop() == 0
    deployment.broker.kill()
    deployment.start_device()
    assert deployment.device.get("/ready")["ready"]
    answer = ask(deployment.device, chat("is anybody there?", max_tokens=4))
    assert answer["tidegate"]["route"] == "edge"
    began_s = time.monotonic()
    refused = httpx.post(
        f"{deployment.device.url}/v1/chat/completions", json=to_cloud(), timeout=20
    )
    assert time.monotonic() - began_s < 3
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    assert "broker not connected" in refused.json()["error"]["message"]
    deployment.start_broker(port)
    deployment.ready()
    answer = ask(deployment.device, to_cloud(max_tokens=20))
    assert answer["tidegate"]["route"] == "cloud"


def test_an_answer_that_outgrows_the_device_goes_on_in_the_cloud(deployment: Deployment) -> None:
    folder = deployment.folder
    add_device(folder / "gateway" / "fleet", folder / "small", [folder / "gateway"])
    small = deployment.another_device("small", "--context", "128")
    deployment.ready(small)
    body = chat("tell me everything", max_tokens=200)
    with streamed(small.url, body) as stream:
        stream.read()
    told = [chunk["tidegate"] for chunk in stream.chunks if "tidegate" in chunk]
    assert (told[0]["route"], told[-1]["route"]) == ("edge", "cloud")
    assert told[-1]["reason"] == "continued in the cloud: the device's 128 tokens are full"
    assert stream.usage["completion_tokens"] == 200
    assert small.get("/status")["handoffs"] == 1
    cut = ask(small, body | {"tidegate": {"privacy": "local"}})
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["total_tokens"] == 128
    assert stream.text.startswith(text_of(cut))
