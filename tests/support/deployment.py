"""Broker, cloud and device as processes of their own, and questions to them; for system tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from services import Service, Services, until
from streams import chat

SAID = "the confidential heron nests under the northern sluice"
LONG = 700
"""Tokens: at about 5 ms each the answer still streams when something is killed in its middle."""


def to_cloud(said: str = SAID, *, max_tokens: int = LONG, **fields: object) -> dict[str, object]:
    """A sampled chat with a seed that asks for the cloud."""
    return chat(
        said,
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=0.8,
        seed=3,
        tidegate={"route": "cloud"},
        **fields,
    )


@dataclass(kw_only=True)
class Deployment:
    """Broker, cloud and device, each of which can be killed and started again."""

    services: Services
    bundle: Path
    checkpoint: Path
    broker: Service = field(init=False)
    cloud: Service = field(init=False)
    device: Service = field(init=False)

    @property
    def folder(self) -> Path:
        return self.services.folder

    @property
    def port(self) -> int:
        return int(self.broker.url.rsplit(":", 1)[1])

    def start_broker(self, port: int | None = None) -> None:
        self.broker = self.services.mosquitto(port)

    def start_cloud(self) -> None:
        keys = str(self.folder / "gateway")
        self.cloud = self.services.cloud(self.checkpoint, "--link", self.broker.url, "--keys", keys)

    def start_device(self) -> None:
        self.device = self.another_device("device")

    def another_device(self, keys: str, *arguments: str) -> Service:
        link = ("--link", self.broker.url, "--keys", str(self.folder / keys))
        return self.services.serve(self.bundle, *link, *arguments)

    def ready(self, device: Service | None = None) -> None:
        """Wait until the device has heard from the gateway."""
        until(lambda: reachable(device or self.device), "the route to the cloud opens")


def reachable(device: Service) -> bool:
    return bool(device.get("/status")["link"]["reachable"])


def ask(service: Service, body: dict[str, object]) -> Any:
    """A whole answer."""
    response = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def directly(deployment: Deployment, body: dict[str, object]) -> str:
    """What the cloud answers over its own HTTP port, with no link in between."""
    return text_of(ask(deployment.cloud, body))
