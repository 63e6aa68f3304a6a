"""Whoever has all of a gateway but its signing key can read a request, and cannot answer it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from linklab import CrashingDatabase

from tidegate.link import gateway_store, outbox
from tidegate.link.device_core import DeviceCore
from tidegate.link.device_states import State
from tidegate.link.effects import Ended, GatewayEffect, Publish, Start
from tidegate.link.envelope import new_request_id
from tidegate.link.fleet import pair
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_output import Finished, Produced
from tidegate.link.gateway_store import GatewayStore
from tidegate.link.identity import GatewayIdentity, load_device, load_gateway
from tidegate.link.messages import Status
from tidegate.link.outbox import Outbox
from tidegate.link.prekeys import PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.timing import Timing

WALL_S = 1_800_000_000.0
TIMING = Timing(pacing="off")


def wall_s() -> float:
    return WALL_S


def new_gateway(
    root: Path, name: str, identity: GatewayIdentity, prekeys: PrekeyStore
) -> tuple[GatewayCore, GatewayStore]:
    store = GatewayStore(CrashingDatabase(root / f"{name}.sqlite", gateway_store.SCHEMA))
    registry = DeviceRegistry(root / "gateway" / "devices.sqlite")
    keys = GatewayKeys(identity=identity, prekeys=prekeys, registry=registry, wall_s=wall_s)
    core = GatewayCore(
        keys=keys, store=store, timing=TIMING, max_requests=4, wall_s=wall_s, now_s=0.0
    )
    return core, store


def answer(gateway: GatewayCore, request: Publish, payload: bytes) -> list[Publish]:
    """What `gateway` says to `request`, which it can open."""
    effects: list[GatewayEffect] = gateway.receive(0.0, request.topic, request.payload)
    (start,) = [effect for effect in effects if isinstance(effect, Start)]
    assert start.request.body == b"prompt"
    outputs = [Produced(start.run, output) for output in (payload, Finished(Status.COMPLETE))]
    effects += gateway.produced(0.0, outputs)
    return [effect for effect in effects if isinstance(effect, Publish)]


def test_an_answer_under_a_stolen_prekey_is_dropped_and_the_true_one_is_taken(
    tmp_path: Path,
) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    identity, prekeys = load_gateway(tmp_path / "gateway"), PrekeyStore(tmp_path / "prekeys.json")
    gateway, store = new_gateway(tmp_path, "true", identity, prekeys)
    other_key = dataclasses.replace(identity, key=Ed25519PrivateKey.generate())
    thief, thiefs_store = new_gateway(tmp_path, "thief", other_key, prekeys)
    box = Outbox(CrashingDatabase(tmp_path / "o.sqlite", outbox.SCHEMA))
    device = DeviceCore(
        identity=load_device(tmp_path / "device"),
        outbox=box,
        timing=TIMING,
        rng=random.Random(0),
        wall_s=wall_s,
        now_s=0.0,
    )
    advert = gateway.advert((), None)
    device.receive(0.0, advert.topic, advert.payload)
    device.on_connected(0.0)
    request_id = new_request_id(int(WALL_S * 1000))
    device.submit(0.0, b"prompt", request_id=request_id, deadline_s=60.0, model=None)
    (request,) = [effect for effect in device.poll(0.1) if isinstance(effect, Publish)]
    for lie in answer(thief, request, b"lies"):
        assert device.receive(0.2, lie.topic, lie.payload) == []
    assert device.tally.snapshot().dropped >= 1
    effects = [
        effect
        for message in answer(gateway, request, b"truth")
        for effect in device.receive(0.2, message.topic, message.payload)
    ]
    assert Ended(request_id=request_id, state=State.DONE, code="") in effects
    standing = device.standing(request_id)
    assert standing is not None
    assert standing.payloads == [b"truth"]
    for end in (store, thiefs_store, box):
        end.close()
