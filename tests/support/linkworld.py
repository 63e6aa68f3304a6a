"""Both ends of the link on a virtual clock, with a bad network and processes that die.

One seed is one history: the same seed always gives the same one, because time, randomness, the
network and every crash come from it. Keys are random, but nothing decides by their bytes.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from linklab import Crash, CrashingDatabase

from tidegate.link import gateway_store, outbox
from tidegate.link.device_core import DeviceCore
from tidegate.link.device_states import State
from tidegate.link.effects import (
    Delivered,
    DeviceEffect,
    Ended,
    GatewayEffect,
    Publish,
    Release,
    RunId,
    Start,
    Stop,
)
from tidegate.link.envelope import RequestId, new_request_id
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_output import Finished, Produced
from tidegate.link.gateway_store import GatewayStore
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.messages import Status
from tidegate.link.outbox import Outbox, Outcome
from tidegate.link.prekeys import ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.timing import Timing

WALL_S = 1_800_000_000.0
TIMING = Timing(lease_s=20.0, advert_every_s=10.0, advert_valid_s=40.0, connect_timeout_s=3600.0)


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What goes wrong: chances per message, and how often things die, per simulated second."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    outage_every_s: float = 0.0
    device_crash_every_s: float = 0.0
    gateway_crash_every_s: float = 0.0
    calm_after_s: float = 60.0
    """From then on nothing goes wrong, so that everything must end."""


@dataclass
class App:
    """What one request's application has seen in this life of the device."""

    next_number: int = 0
    ends: int = 0


@dataclass
class World:
    """One device, one gateway, one broker that keeps retained adverts."""

    seed: int
    weather: Weather
    fleet: Path
    scratch: Path
    now_s: float = 0.0
    diverging: bool = False
    """The handler says something else at every run, from a random payload on."""
    runs: dict[RequestId, int] = field(default_factory=dict)
    crashes: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.disk = {
            "device": CrashingDatabase(self.scratch / f"d{self.seed}.sqlite", outbox.SCHEMA),
            "gateway": CrashingDatabase(
                self.scratch / f"g{self.seed}.sqlite", gateway_store.SCHEMA
            ),
        }
        self.registry = DeviceRegistry(self.fleet / "gateway" / "devices.sqlite")
        self.prekeys = PrekeyStore(self.fleet / "gateway" / f"prekeys{self.seed}.json")
        self.device_identity = load_device(self.fleet / "device")
        self.gateway_identity = load_gateway(self.fleet / "gateway")
        self.order = itertools.count()
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.retained: Publish | None = None
        self.up = True
        self.device: DeviceCore | None = None
        self.gateway: GatewayCore | None = None
        self.apps: dict[RequestId, App] = {}
        self.expected: dict[RequestId, list[bytes]] = {}
        self.results: dict[RequestId, list[bytes]] = {}
        self.failures: dict[RequestId, str] = {}
        self.said: dict[RequestId, list[list[bytes]]] = {}
        self.handlers: dict[RunId, list[bytes]] = {}
        self.life = itertools.count()
        self.gateway_life = 0
        self.start_gateway()
        self.start_device()
        for every_s, action in (
            (self.weather.outage_every_s, self.cut),
            (self.weather.device_crash_every_s, lambda: self.light("device")),
            (self.weather.gateway_crash_every_s, lambda: self.light("gateway")),
        ):
            if every_s:
                self.repeat(every_s, action)

    # Time.

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.agenda, (self.now_s + delay_s, next(self.order), action))

    def repeat(self, every_s: float, action: Callable[[], None]) -> None:
        def again() -> None:
            if self.now_s < self.weather.calm_after_s:
                action()
                self.after(self.rng.expovariate(1 / every_s), again)

        self.after(self.rng.expovariate(1 / every_s), again)

    def run(self, answers: int, until_s: float) -> None:
        """Let time pass until so many requests have been read, or `until_s`."""
        while self.now_s < until_s and len(self.results) + len(self.failures) < answers:
            due = self.agenda[0][0] if self.agenda else until_s
            for core in (self.device, self.gateway):
                if core is not None:
                    due = min(due, core.next_wakeup_s())
            self.now_s = max(self.now_s, due)
            while self.agenda and self.agenda[0][0] <= self.now_s:
                heapq.heappop(self.agenda)[2]()
            self.on_device(lambda core: core.poll(self.now_s))
            self.on_gateway(lambda core: core.poll(self.now_s))

    # The two ends.

    def start_device(self) -> None:
        try:
            self.device = DeviceCore(
                identity=self.device_identity,
                outbox=Outbox(self.disk["device"]),
                timing=TIMING,
                rng=self.rng,
                wall_s=lambda: WALL_S + self.now_s,
                now_s=self.now_s,
            )
        except Crash:
            self.die("device")
            return
        self.apps = {}
        self.on_device(self.read_stored)
        if self.up:
            self.connect_device()

    def read_stored(self, core: DeviceCore) -> list[DeviceEffect]:
        """The application comes back for every request it had not read to the end."""
        for held in core.stored():
            request_id, outcome = held.request_id, held.outcome
            standing = core.standing(request_id)
            assert standing is not None
            self.apps[request_id] = App(next_number=len(standing.payloads))
            if outcome is not Outcome.OPEN:
                self.read(core, request_id, State.DONE)
        return []

    def connect_device(self) -> None:
        if self.device is not None:
            self.device.on_connected(self.now_s)
            if self.retained is not None:
                self.deliver(self.retained)

    def start_gateway(self) -> None:
        self.gateway_life = life = next(self.life)
        self.gateway = GatewayCore(
            keys=GatewayKeys(
                identity=self.gateway_identity,
                prekeys=self.prekeys,
                registry=self.registry,
                wall_s=lambda: WALL_S + self.now_s,
            ),
            store=GatewayStore(self.disk["gateway"]),
            timing=TIMING,
            max_requests=16,
            wall_s=lambda: WALL_S + self.now_s,
            now_s=self.now_s,
        )
        self.handlers = {}
        self.advertise(life)

    def advertise(self, life: int) -> None:
        if life == self.gateway_life and self.gateway is not None:
            self.on_gateway(
                lambda core: [core.advert((ModelOffer(id="m", context_tokens=2048),), None)]
            )
            self.after(TIMING.advert_every_s, lambda: self.advertise(life))

    def die(self, name: str) -> None:
        self.crashes += 1
        if name == "device":
            self.device = None
            self.after(self.rng.uniform(0.0, 4.0), self.start_device)
        else:
            self.gateway = None
            self.after(self.rng.uniform(0.0, 4.0), self.start_gateway)

    def light(self, name: str) -> None:
        self.disk[name].light(self.rng, 6)

    def on_device(self, act: Callable[[DeviceCore], list[DeviceEffect]]) -> None:
        if self.device is None:
            return
        try:
            for effect in act(self.device):
                match effect:
                    case Publish():
                        self.publish(effect)
                    case Delivered(request_id=request_id, first=first, payloads=payloads):
                        app = self.apps[request_id]
                        assert first == app.next_number, "a payload came twice or not at all"
                        app.next_number += len(payloads)
                    case Ended(request_id=request_id, state=state):
                        self.apps[request_id].ends += 1
                        assert self.apps[request_id].ends == 1
                        self.read(self.device, request_id, state)
        except Crash:
            self.die("device")

    def read(self, core: DeviceCore, request_id: RequestId, state: State) -> None:
        """The application keeps the answer, then lets the link forget it.

        Dying between the two shows it a request that it has: it only lets go again.
        """
        standing = core.standing(request_id)
        assert standing is not None
        if self.diverging and standing.outcome is Outcome.FAILED:
            self.failures[request_id] = standing.code
            core.release(request_id)
            return
        assert state is State.DONE, state
        if self.results.setdefault(request_id, standing.payloads) != standing.payloads:
            raise AssertionError("the answer changed")
        core.release(request_id)

    def on_gateway(self, act: Callable[[GatewayCore], list[GatewayEffect]]) -> None:
        if self.gateway is None:
            return
        try:
            for effect in act(self.gateway):
                match effect:
                    case Publish():
                        self.publish(effect)
                    case Start(run=run, request=request):
                        self.runs[request.request_id] = self.runs.get(request.request_id, 0) + 1
                        self.handlers[run] = list(self.answer_of_run(request.request_id))
                        self.produce_later(run, self.gateway_life)
                    case Stop(run):
                        self.handlers.pop(run, None)
                    case Release():
                        pass
        except Crash:
            self.die("gateway")

    def answer_of_run(self, request_id: RequestId) -> list[bytes]:
        answer = self.expected[request_id]
        if self.diverging:
            same = self.rng.randrange(len(answer) + 1)
            answer = answer[:same] + [self.rng.randbytes(8) for _ in answer[same:]]
        self.said.setdefault(request_id, []).append(list(answer))
        return answer

    def produce_later(self, run: RunId, life: int) -> None:
        def produce() -> None:
            left = self.handlers.get(run)
            if left is None or life != self.gateway_life:
                return
            count = min(len(left), self.rng.randrange(4))
            outputs: list[bytes | Finished] = [left.pop(0) for _ in range(count)]
            if not left:
                outputs.append(Finished(Status.COMPLETE))
            batch = [Produced(run, output) for output in outputs]
            self.on_gateway(lambda core: core.produced(self.now_s, batch))
            if left:
                self.produce_later(run, life)

        self.after(self.rng.uniform(0.0, 1.0), produce)

    # The network.

    def cut(self) -> None:
        """The broker goes away and comes back without memory of anything but its clients."""
        if not self.up:
            return
        self.up, self.retained = False, None
        if self.device is not None:
            self.device.on_disconnected()

        def restore() -> None:
            self.up = True
            life = self.gateway_life
            self.after(self.rng.uniform(0.0, 1.0), lambda: self.advertise(life))
            self.after(self.rng.uniform(0.0, 1.0), self.connect_device)

        self.after(self.rng.uniform(0.1, 5.0), restore)

    def publish(self, message: Publish) -> None:
        if message.retain:
            self.retained = message
        bad = self.now_s < self.weather.calm_after_s
        if not self.up or (bad and self.rng.random() < self.weather.drop):
            return
        copies = 2 if bad and self.rng.random() < self.weather.duplicate else 1
        for _ in range(copies):
            late = bad and self.rng.random() < self.weather.reorder
            delay_s = self.rng.uniform(0.5, 3.0) if late else 0.02
            self.after(delay_s, lambda: self.deliver(self.damage(message, bad)))

    def damage(self, message: Publish, bad: bool) -> Publish:
        if not bad or self.rng.random() >= self.weather.corrupt:
            return message
        payload = bytearray(message.payload)
        payload[self.rng.randrange(len(payload))] ^= 1 << self.rng.randrange(8)
        return Publish(topic=message.topic, payload=bytes(payload))

    def deliver(self, message: Publish) -> None:
        if not self.up:
            return
        topic, payload = message.topic, message.payload
        if "/q/" in topic:
            self.on_gateway(lambda core: core.receive(self.now_s, topic, payload))
        else:
            self.on_device(lambda core: core.receive(self.now_s, topic, payload))

    # The application.

    def ask(self, payloads: int) -> None:
        """Submit a request; a crash while doing so makes the application try again."""
        request_id = new_request_id(int((WALL_S + self.now_s) * 1000))
        answer = [b"%d:" % i + self.rng.randbytes(self.rng.randrange(80)) for i in range(payloads)]
        self.expected[request_id] = answer
        self.submit(request_id)

    def submit(self, request_id: RequestId) -> None:
        def submit(core: DeviceCore) -> list[DeviceEffect]:
            over = request_id in self.results or request_id in self.failures
            if not over and core.standing(request_id) is None:
                core.submit(
                    self.now_s, b"prompt", request_id=request_id, deadline_s=3600, model=None
                )
                self.apps[request_id] = App()
            return []

        self.on_device(submit)
        if request_id not in self.apps and request_id not in self.results:
            self.after(1.0, lambda: self.submit(request_id))

    def close(self) -> None:
        for disk in self.disk.values():
            disk.close()
        self.registry.close()
