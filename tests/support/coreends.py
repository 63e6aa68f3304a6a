"""Both cores of the link with nothing but a test's hands between them."""

from __future__ import annotations

import random
from pathlib import Path

from linklab import CrashingDatabase

from tidegate.link import gateway_store, outbox
from tidegate.link.device_core import DeviceCore
from tidegate.link.effects import (
    DeviceEffect,
    GatewayEffect,
    Publish,
    RunId,
    Start,
)
from tidegate.link.envelope import (
    MessageType,
    RequestId,
    new_request_id,
    seal_request,
)
from tidegate.link.fleet import pair
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_output import Finished, Produced
from tidegate.link.gateway_store import GatewayStore
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.messages import Call, Status
from tidegate.link.outbox import Outbox
from tidegate.link.prekeys import ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.timing import Timing

WALL_S = 1_800_000_000.0

OFFERS = (ModelOffer(id="m", context_tokens=2048),)


class Ends:
    """Both cores with nothing but our hands between them."""

    other: GatewayCore

    def __init__(self, root: Path, *, max_requests: int = 4, timing: Timing | None = None) -> None:
        pair(root / "device", root / "gateway")
        self.root = root
        self.now_s = 0.0
        self.timing = timing or Timing(pacing="off")
        self.registry = DeviceRegistry(root / "gateway" / "devices.sqlite")
        self.device_disk = CrashingDatabase(root / "o.sqlite", outbox.SCHEMA)
        self.gateway_disk = CrashingDatabase(root / "g.sqlite", gateway_store.SCHEMA)
        self.outbox = Outbox(self.device_disk)
        self.store = GatewayStore(self.gateway_disk)
        self.prekeys = PrekeyStore(root / "prekeys.json")
        self.max_requests = max_requests
        self.start_device()
        self.start_gateway()

    def wall_s(self) -> float:
        return WALL_S + self.now_s

    def start_device(self) -> None:
        self.device = DeviceCore(
            identity=load_device(self.root / "device"),
            outbox=self.outbox,
            timing=self.timing,
            rng=random.Random(0),
            wall_s=self.wall_s,
            now_s=self.now_s,
        )

    def start_gateway(self) -> None:
        self.gateway = GatewayCore(
            keys=GatewayKeys(
                identity=load_gateway(self.root / "gateway"),
                prekeys=self.prekeys,
                registry=self.registry,
                wall_s=self.wall_s,
            ),
            store=self.store,
            timing=self.timing,
            max_requests=self.max_requests,
            wall_s=self.wall_s,
            now_s=self.now_s,
        )

    def meet(self) -> None:
        advert = self.gateway.advert(OFFERS, None)
        self.device.receive(self.now_s, advert.topic, advert.payload)
        self.device.on_connected(self.now_s)

    def ask(
        self, body: bytes = b"prompt", model: str | None = None, priority: int = 1
    ) -> RequestId:
        request_id = new_request_id(int(self.wall_s() * 1000))
        self.device.submit(
            self.now_s,
            body,
            request_id=request_id,
            deadline_s=600.0,
            model=model,
            priority=priority,
        )
        return request_id

    def request(self) -> Publish:
        """The one request message that is due."""
        due = self.device.poll(self.now_s + 0.1)
        (message,) = [
            effect
            for effect in due
            if isinstance(effect, Publish) and effect.payload[0] == MessageType.REQUEST
        ]
        return message

    def seal_as(self, device_name: str, call: Call) -> Publish:
        """A request by hand, of a device that may not be ours."""
        device, prekey = load_device(self.root / device_name), self.prekeys.public(self.wall_s())[0]
        (message,), _ = seal_request(
            call.encode(),
            request_id=new_request_id(int(self.wall_s() * 1000)),
            attempt=0,
            prekey_id=prekey.prekey_id,
            prekey=prekey.public,
            gateway_key=load_gateway(self.root / "gateway").key.public_key(),
            device_id=device.device_id,
            device_key=device.key,
            handle=device.handle,
        )
        return Publish(topic=f"tidegate/1/home/gw/gw0/q/{device.handle}", payload=message)

    def to_gateway(self, message: Publish) -> list[GatewayEffect]:
        return self.gateway.receive(self.now_s, message.topic, message.payload)

    def to_device(self, message: Publish) -> list[DeviceEffect]:
        return self.device.receive(self.now_s, message.topic, message.payload)

    def finish(self, run: RunId, *payloads: bytes) -> list[Publish]:
        outputs: list[bytes | Finished] = [*payloads, Finished(Status.COMPLETE)]
        batch = [Produced(run, output) for output in outputs]
        return published(self.gateway.produced(self.now_s, batch))

    def close(self) -> None:
        self.outbox.close()
        self.store.close()
        self.registry.close()


def published(effects: list[GatewayEffect]) -> list[Publish]:
    return [effect for effect in effects if isinstance(effect, Publish)]


def started(effects: list[GatewayEffect]) -> Start:
    (start,) = [effect for effect in effects if isinstance(effect, Start)]
    return start
