"""A device daemon killed while it streams an answer from the cloud: asked again, it has all of it.

A real mosquitto, a real gateway, `tidegate serve`; the kill is SIGKILL, so nobody says goodbye.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from deployment import LONG, Deployment, directly, to_cloud
from services import Services, until
from streams import streamed

from tidegate.link.fleet import pair

pytestmark = [pytest.mark.system, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def deployment(
    bundle: Path, cloud_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("device-death")
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


def held(deployment: Deployment) -> list[dict[str, object]]:
    """What the device's outbox holds."""
    answers: list[dict[str, object]] = deployment.device.get("/link/answers")["answers"]
    return answers


def read_and_kill(deployment: Deployment, texts: int, *, key: str | None) -> str:
    """Stream the long answer, kill the daemon after so many pieces; returns what was read."""
    headers = {} if key is None else {"Idempotency-Key": key}
    with streamed(deployment.device.url, to_cloud(), headers=headers) as stream:
        stream.read(texts)
        assert stream.route == "cloud"
        deployment.device.kill()
        with pytest.raises(httpx.HTTPError):
            stream.read()
    assert not stream.done
    return stream.text


def answered(deployment: Deployment) -> int:
    """Answers that the gateway generated to their end."""
    return int(deployment.cloud.metric("tidegate_link_completed_total"))


def test_who_asks_again_with_the_key_reads_the_whole_answer_once(
    deployment: Deployment, expected: str
) -> None:
    before = answered(deployment)
    seen = read_and_kill(deployment, 40, key="tale-1")
    assert 0 < len(seen) < len(expected)
    assert expected.startswith(seen)
    deployment.start_device()
    # Killed again in the middle of the second reading: what was read once is still whole.
    seen = read_and_kill(deployment, 60, key="tale-1")
    assert expected.startswith(seen)
    deployment.start_device()
    assert len(held(deployment)) == 1, "three askers, one request"
    headers = {"Idempotency-Key": "tale-1"}
    with streamed(deployment.device.url, to_cloud(), headers=headers) as stream:
        stream.read()
    assert stream.done
    assert stream.text == expected
    assert stream.usage["completion_tokens"] == LONG
    assert stream.chunks[0]["tidegate"]["reason"].startswith("asked again")
    assert deployment.device.metric("tidegate_link_resends_total") >= 1
    until(lambda: not held(deployment), "what was read is forgotten", within_s=5)
    assert answered(deployment) == before + 1, "it was generated once"


def test_an_answer_whose_caller_had_no_key_waits_whole_until_it_is_taken(
    deployment: Deployment, expected: str
) -> None:
    before = answered(deployment)
    read_and_kill(deployment, 40, key=None)
    deployment.start_device()
    (known,) = held(deployment)
    path = f"/link/answers/{known['id']}"
    until(
        lambda: deployment.device.get(path)["state"] == "whole", "the answer is whole", within_s=20
    )
    answer = deployment.device.get(path)
    assert answer["text"] == expected
    assert answer["completion_tokens"] == LONG
    # It outlives its whole daemon as well.
    deployment.device.kill()
    deployment.start_device()
    assert deployment.device.get(path)["text"] == expected
    url = f"{deployment.device.url}{path}"
    assert [httpx.delete(url, timeout=10).status_code for _ in range(2)] == [204, 404]
    assert held(deployment) == []
    assert answered(deployment) == before + 1, "it was generated once"
