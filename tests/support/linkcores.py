"""Both cores of the link, turn by turn, on disks that count their writes and may die."""

from __future__ import annotations

import random
from pathlib import Path

from linklab import CrashingDatabase

from tidegate.link import gateway_store, outbox
from tidegate.link.device_core import DeviceCore
from tidegate.link.effects import (
    Publish,
    RunId,
    Start,
)
from tidegate.link.envelope import RequestId, new_request_id
from tidegate.link.fleet import pair
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_store import GatewayStore
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.outbox import Outbox
from tidegate.link.prekeys import ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.timing import Timing
from tidegate.link.transport import Message

WALL_S = 1_800_000_000.0


class CorePair:
    """Both cores, and disks that say how often they were written."""

    def __init__(self, root: Path, timing: Timing) -> None:
        pair(root / "device", root / "gateway")
        self.root, self.timing = root, timing
        self.registry = DeviceRegistry(root / "gateway" / "devices.sqlite")
        self.device_disk = CrashingDatabase(root / "o.sqlite", outbox.SCHEMA)
        self.gateway_disk = CrashingDatabase(root / "g.sqlite", gateway_store.SCHEMA)
        self.device = DeviceCore(
            identity=load_device(root / "device"),
            outbox=Outbox(self.device_disk),
            timing=timing,
            rng=random.Random(0),
            wall_s=lambda: WALL_S,
            now_s=0.0,
        )
        self.start_gateway()

    def start_gateway(self) -> None:
        self.gateway = GatewayCore(
            keys=GatewayKeys(
                identity=load_gateway(self.root / "gateway"),
                prekeys=PrekeyStore(self.root / "prekeys.json"),
                registry=self.registry,
                wall_s=lambda: WALL_S,
            ),
            store=GatewayStore(self.gateway_disk),
            timing=self.timing,
            max_requests=64,
            wall_s=lambda: WALL_S,
            now_s=0.0,
        )
        advert = self.gateway.advert((ModelOffer(id="m", context_tokens=2048),), None)
        self.device.receive(0.0, advert.topic, advert.payload)
        self.device.on_connected(0.0)

    def ask(self, count: int, now_s: float = 0.1) -> tuple[list[Message], list[RequestId]]:
        names = [new_request_id(int(WALL_S * 1000)) for _ in range(count)]
        for name in names:
            self.device.submit(0.0, b"prompt", request_id=name, deadline_s=600.0, model=None)
        return as_messages(self.device.poll(now_s)), names

    def begin(self, count: int) -> list[RunId]:
        effects = self.gateway.turn(0.1, self.ask(count)[0], [])
        self.device.turn(0.1, as_messages(effects))
        return [effect.run for effect in effects if isinstance(effect, Start)]

    def close(self) -> None:
        self.device_disk.close()
        self.gateway_disk.close()
        self.registry.close()


def as_messages(effects: object) -> list[Message]:
    assert isinstance(effects, list)
    return [Message(one.topic, one.payload) for one in effects if isinstance(one, Publish)]
