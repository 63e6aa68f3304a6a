"""One device core and one gateway core for the fuzzer, with hands on both ends' keys."""

from __future__ import annotations

import random
from pathlib import Path

from link.mutations import mutate
from linklab import CrashingDatabase

from tidegate.link import gateway_store, outbox
from tidegate.link.device_core import DeviceCore
from tidegate.link.effects import Publish, Start
from tidegate.link.envelope import (
    DeviceAttempt,
    GatewayAttempt,
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
from tidegate.link.messages import Bundle, Call, Control, ControlKind, Prefix, Status
from tidegate.link.outbox import Outbox
from tidegate.link.prekeys import ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.timing import Timing
from tidegate.link.wire import FRAGMENT_BYTES

WALL_S = 1_800_000_000.0
_STEP_S = 0.05
_KEPT = 64
Outcome = tuple[str, bytes, str]
"""Mutation, input, and what went wrong, or nothing."""


class Cores:
    """Both cores after they have met, and messages of theirs to mutate."""

    def __init__(self, root: Path) -> None:
        pair(root / "device", root / "gateway")
        self.now_s = 0.0
        self.device_identity = load_device(root / "device")
        self.gateway_identity = load_gateway(root / "gateway")
        self.root = self.device_identity.root
        self._registry = DeviceRegistry(root / "gateway" / "devices.sqlite")
        self._prekeys = PrekeyStore(root / "prekeys.json")
        self._outbox = Outbox(CrashingDatabase(root / "o.sqlite", outbox.SCHEMA))
        self._store = GatewayStore(CrashingDatabase(root / "g.sqlite", gateway_store.SCHEMA))
        timing = Timing(pacing="off")
        self._keys = GatewayKeys(
            identity=self.gateway_identity,
            prekeys=self._prekeys,
            registry=self._registry,
            wall_s=self.wall_s,
        )
        self._gateway = GatewayCore(
            keys=self._keys,
            store=self._store,
            timing=timing,
            max_requests=16,
            wall_s=self.wall_s,
            now_s=0.0,
        )
        self._device = DeviceCore(
            identity=self.device_identity,
            outbox=self._outbox,
            timing=timing,
            rng=random.Random(0),
            wall_s=self.wall_s,
            now_s=0.0,
        )
        message = self._gateway.advert((ModelOffer(id="m", context_tokens=2048),), None)
        self._advert_topic, self.advert = message.topic, message.payload
        self._device.receive(0.0, message.topic, message.payload)
        self._device.on_connected(0.0)
        handle = self.device_identity.handle
        self._up, self._down = f"tidegate/1/home/gw/gw0/q/{handle}", f"tidegate/1/home/r/{handle}"
        self._said: list[tuple[str, bytes]] = [(self._advert_topic, self.advert)]
        self._sent: DeviceAttempt | None = None
        self._asked: GatewayAttempt | None = None
        self._seal(Call(have=0, credit=9, ttl_ms=60_000, body=bytes(FRAGMENT_BYTES)).encode())

    def wall_s(self) -> float:
        return WALL_S + self.now_s

    def close(self) -> None:
        self._outbox.close()
        self._store.close()
        self._registry.close()

    def outsider(self, rng: random.Random) -> Outcome:
        """A mutated message to one of the cores: refused and counted, and nothing else."""
        if rng.random() < 0.05:
            self._converse(rng)
        topic, right = rng.choice(self._said)
        mutation, data = mutate(rng, right, rng.choice(self._said)[1])
        if any(data == one for _, one in self._said):
            return mutation, data, ""
        before = self._refusals()
        problem = self._give(topic, data)
        if not problem and self._refusals() != before + 1:
            problem = f"not counted as dropped on {topic}"
        return mutation, data, problem

    def insider(self, rng: random.Random) -> Outcome:
        """A mutated plaintext under the right keys: anything but an exception may come of it."""
        proof = Prefix([b"a"]).proof()
        call = Call(
            have=rng.choice((0, 1)), credit=4, ttl_ms=9000, proof=proof, body=b"{}"
        ).encode()
        control = Control(kind=rng.choice(tuple(ControlKind)), have=1, credit=2, seen=1).encode()
        bundle = rng.choice(
            (
                Bundle(first=0, payloads=(b"one", b"two")),
                Bundle(first=2, payloads=(b"three",), status=Status.COMPLETE),
                Bundle(first=0, status=Status.FAILED, code="x"),
            )
        ).encode()
        kind = rng.choice(("call", "control", "bundle"))
        right = {"call": call, "control": control, "bundle": bundle}[kind]
        mutation, data = mutate(rng, right, rng.choice((call, control, bundle)))
        data = data[:60_000]
        if kind == "call" or self._sent is None:
            messages = self._seal(data)
            return mutation, data, next(filter(None, map(self._to_gateway, messages)), "")
        if kind == "control":
            return mutation, data, self._to_gateway(self._sent.seal_control(data))
        if self._asked is None or rng.random() < 0.1:
            self._ask(rng)
        assert self._asked is not None
        answer = self._asked.seal_response(data, final=rng.random() < 0.5)
        return mutation, data, self._give(self._down, answer)

    def take_advert(self, data: bytes) -> str:
        """The device hears an advert, then asks whoever it thinks is best; what was raised."""
        try:
            self._device.receive(self.now_s, self._advert_topic, data)
            self._device.gateways(self.now_s)
        except Exception as error:
            return repr(error)
        return ""

    def _to_gateway(self, message: bytes) -> str:
        return self._give(self._up, message)

    def _give(self, topic: str, data: bytes) -> str:
        """Hand it over and let time pass; what was raised, if anything was."""
        try:
            self._receive(topic, data)
            self.now_s += _STEP_S
            self._gateway.poll(self.now_s)
            self._device.poll(self.now_s)
        except Exception as error:
            return repr(error)
        return ""

    def _receive(self, topic: str, data: bytes) -> None:
        if topic != self._up:
            self._device.receive(self.now_s, topic, data)
            return
        for effect in self._gateway.receive(self.now_s, topic, data):
            if isinstance(effect, Start):
                outputs: list[bytes | Finished] = [b"one", b"two", Finished(Status.COMPLETE)]
                batch = [Produced(effect.run, output) for output in outputs]
                self._gateway.produced(self.now_s, batch)

    def _refusals(self) -> int:
        ends = (self._device.tally.snapshot(), self._gateway.tally.snapshot())
        return sum(end.dropped + end.adverts_rejected for end in ends)

    def _remember(self, topic: str, message: bytes) -> None:
        self._said.append((topic, message))
        if len(self._said) > _KEPT:
            del self._said[1]

    def _seal(self, plaintext: bytes) -> list[bytes]:
        """A request of our device, by hand."""
        prekeys = self._prekeys.public(self.wall_s())
        prekey = prekeys[int(self.now_s / _STEP_S) % len(prekeys)]
        messages, self._sent = seal_request(
            plaintext,
            request_id=new_request_id(int(self.wall_s() * 1000)),
            attempt=0,
            prekey_id=prekey.prekey_id,
            prekey=prekey.public,
            gateway_key=self.gateway_identity.key.public_key(),
            device_id=self.device_identity.device_id,
            device_key=self.device_identity.key,
            handle=self.device_identity.handle,
        )
        for message in messages:
            self._remember(self._up, message)
        return messages

    def _converse(self, rng: random.Random) -> None:
        """One right request with its answer and controls, of which every message is kept."""
        request_id = self._ask(rng)
        if self._asked is None or self._asked.request_id != request_id:
            return
        for end in (Bundle(first=0, payloads=(b"one",)), Bundle(first=1, status=Status.COMPLETE)):
            final = end.status is not Status.MORE
            self._remember(self._down, self._asked.seal_response(end.encode(), final=final))
        assert self._sent is not None
        control = Control(kind=ControlKind.ACK, have=1, credit=2, seen=1)
        self._remember(self._up, self._sent.seal_control(control.encode()))

    def _ask(self, rng: random.Random) -> RequestId:
        """Have the device ask, and take the gateway's part by hand."""
        request_id = new_request_id(int(self.wall_s() * 1000))
        body = rng.randbytes(rng.randrange(300))
        self._device.submit(self.now_s, body, request_id=request_id, deadline_s=60.0, model=None)
        for effect in self._device.poll(self.now_s + 0.01):
            if isinstance(effect, Publish) and effect.payload[0] == MessageType.REQUEST:
                opened = self._keys.open(self.now_s, self.device_identity.handle, effect.payload)
                self._asked = opened or self._asked
        return request_id
