"""Real processes on two paths: mosquitto dies and comes back, and no answer loses a word."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from deployment import Deployment, ask, directly, reachable, text_of, to_cloud
from services import Service, Services, free_port, run_tidegate, until
from streams import streamed

from tidegate.link.certificates_store import BROKER_CA
from tidegate.link.fleet import add_device, pair
from tidegate.link.identity import load_device

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@dataclass(kw_only=True)
class TwoPaths(Deployment):
    """A deployment whose gateway also takes devices over HTTPS."""

    http: int = field(default_factory=free_port)

    @property
    def gateway_url(self) -> str:
        return f"https://localhost:{self.http}"

    def start_cloud(self) -> None:
        self.cloud = self.services.cloud(
            self.checkpoint,
            *("--link", self.broker.url, "--keys", str(self.folder / "gateway")),
            *("--link-http", f"127.0.0.1:{self.http}"),
            *("--link-http-name", "localhost", "--link-http-name", "127.0.0.1"),
        )

    def start_device(self) -> None:
        link = ("--link-http", self.gateway_url, "--link-http-after", "1")
        self.device = self.another_device("device", *link)

    def path(self, device: Service | None = None) -> str:
        return str((device or self.device).get("/status")["link"]["path"])


def shares_authority(folder: Path, device: str) -> None:
    """Give a device the fleet's roots, as enrolment does."""
    (folder / device / BROKER_CA).write_bytes((folder / "gateway" / "ca.pem").read_bytes())


@pytest.fixture(scope="module")
def deployment(
    bundle: Path, cloud_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoPaths]:
    folder = tmp_path_factory.mktemp("paths")
    pair(folder / "device", folder / "gateway")
    shares_authority(folder, "device")
    with Services(folder) as services:
        made = TwoPaths(services=services, bundle=bundle, checkpoint=cloud_checkpoint)
        made.start_broker()
        made.start_cloud()
        made.start_device()
        made.ready()
        yield made


@pytest.fixture(scope="module")
def expected(deployment: TwoPaths) -> str:
    """The long answer, asked at the cloud directly."""
    return directly(deployment, to_cloud())


def test_the_broker_is_the_path_while_it_is_there(deployment: TwoPaths) -> None:
    assert deployment.path() == "mqtt"
    assert deployment.device.metric('tidegate_link_path{path="mqtt"}') == 1
    assert deployment.cloud.metric("tidegate_link_http_devices") == 0
    assert deployment.cloud.get("/status")["link"]["path"] == "mqtt+http"


def test_an_answer_goes_on_over_http_when_the_broker_dies_and_ends_there(
    deployment: TwoPaths, expected: str
) -> None:
    with streamed(deployment.device.url, to_cloud()) as stream:
        stream.read(40)
        deployment.broker.kill()
        stream.read()
    assert stream.done
    assert stream.text == expected
    assert stream.usage["completion_tokens"] == 700
    assert deployment.path() == "http"
    assert deployment.device.metric('tidegate_link_path{path="http"}') == 1
    assert deployment.cloud.metric("tidegate_link_http_devices") == 1


def test_new_requests_go_over_http_while_there_is_no_broker(deployment: TwoPaths) -> None:
    until(lambda: deployment.path() == "http" and reachable(deployment.device), "HTTP is used")
    body = to_cloud(max_tokens=50)
    assert text_of(ask(deployment.device, body)) == directly(deployment, body)


def test_a_broker_that_returns_is_used_again_in_the_middle_of_an_answer(
    deployment: TwoPaths, expected: str
) -> None:
    deployment.start_broker(deployment.port)
    until(lambda: deployment.path() == "mqtt", "the broker is used", within_s=60)
    long = to_cloud(max_tokens=1300)
    with streamed(deployment.device.url, long) as stream:
        stream.read(20)
        deployment.broker.kill()
        until(lambda: deployment.path() == "http", "HTTP is used")
        deployment.start_broker(deployment.port)
        until(lambda: deployment.path() == "mqtt", "the broker is used again")
        assert not stream.done
        stream.read()
    assert stream.text == directly(deployment, long)
    until(lambda: deployment.cloud.metric("tidegate_link_http_devices") == 0, "HTTP is closed")


def test_a_device_that_never_finds_the_broker_works_over_http(deployment: TwoPaths) -> None:
    folder = deployment.folder
    add_device(folder / "gateway" / "fleet", folder / "alone", [folder / "gateway"])
    shares_authority(folder, "alone")
    nowhere = f"mqtt://127.0.0.1:{free_port()}"
    device = deployment.services.serve(
        deployment.bundle,
        *("--link", nowhere, "--keys", str(folder / "alone")),
        *("--link-http", deployment.gateway_url, "--link-http-after", "0.5"),
    )
    deployment.ready(device)
    assert deployment.path(device) == "http"
    body = to_cloud(max_tokens=40)
    assert text_of(ask(device, body)) == directly(deployment, body)
    assert run_tidegate("keys", "rotate", "device", str(folder / "alone")).returncode == 0
    until(lambda: not (folder / "alone" / "device.next.key").exists(), "the key is replaced")
    assert text_of(ask(device, body)) == directly(deployment, body)
    handle = load_device(folder / "alone").handle
    done = run_tidegate("keys", "revoke", str(folder / "gateway"), handle)
    assert done.returncode == 0, done.stderr
    until(lambda: "refused" in device.get("/status")["link"]["broker"], "it is sent away")
    until(lambda: deployment.cloud.metric("tidegate_link_http_devices") == 0, "its stream is cut")
    assert device.stop() == 0


def test_a_device_that_knows_no_broker_works_over_http_alone(deployment: TwoPaths) -> None:
    folder = deployment.folder
    add_device(folder / "gateway" / "fleet", folder / "only", [folder / "gateway"])
    shares_authority(folder, "only")
    device = deployment.services.serve(
        deployment.bundle,
        *("--keys", str(folder / "only"), "--link-http", deployment.gateway_url),
    )
    deployment.ready(device)
    body = to_cloud(max_tokens=40)
    assert text_of(ask(device, body)) == directly(deployment, body)
    assert device.stop() == 0


def test_a_device_learns_the_second_path_through_the_first_and_keeps_it(
    deployment: TwoPaths,
) -> None:
    folder = deployment.folder
    add_device(folder / "gateway" / "fleet", folder / "learner", [folder / "gateway"])
    shares_authority(folder, "learner")
    device = deployment.another_device("learner")
    deployment.ready(device)
    until(lambda: (folder / "learner" / "gateways.json").exists(), "the URL is learned")
    assert deployment.path(device) == "mqtt"
    assert device.stop() == 0
    nowhere = f"mqtt://127.0.0.1:{free_port()}"
    device = deployment.services.serve(
        deployment.bundle,
        *("--link", nowhere, "--keys", str(folder / "learner"), "--link-http-after", "0.5"),
    )
    deployment.ready(device)
    assert deployment.path(device) == "http"
    assert device.stop() == 0


def test_a_cloud_that_is_told_to_stop_first_ends_what_it_streams_over_http(
    deployment: TwoPaths,
) -> None:
    folder = deployment.folder
    device = deployment.services.serve(
        deployment.bundle, *("--keys", str(folder / "only"), "--link-http", deployment.gateway_url)
    )
    deployment.ready(device)
    body = to_cloud(max_tokens=300)
    whole = directly(deployment, body)
    with streamed(device.url, body) as stream:
        stream.read(10)
        assert deployment.cloud.stop() == 0
        stream.read()
    assert stream.text == whole
    deployment.start_cloud()
    assert device.stop() == 0


def test_a_gateway_that_nobody_vouches_for_is_not_spoken_to(deployment: TwoPaths) -> None:
    folder = deployment.folder
    add_device(folder / "gateway" / "fleet", folder / "wary", [folder / "gateway"])
    device = deployment.services.serve(
        deployment.bundle,
        *("--keys", str(folder / "wary"), "--link-http", deployment.gateway_url),
    )
    until(
        lambda: "certificate refused" in device.get("/status")["link"]["broker"],
        "the certificate is refused",
    )
    assert device.stop() == 0


def test_the_second_path_has_nothing_for_strangers(deployment: TwoPaths) -> None:
    roots = str(deployment.folder / "gateway" / "ca.pem")
    context = ssl.create_default_context(cafile=roots)
    with httpx.Client(base_url=deployment.gateway_url, verify=context) as client:
        assert client.get("/v1/models").status_code == 404
        assert client.get("/metrics").status_code == 404
        assert client.get("/tidegate/1/stream").status_code == 401
