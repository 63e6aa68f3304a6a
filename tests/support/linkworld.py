"""Both ends of the link on a virtual clock, with a bad network and processes that die.

One seed is one history: the same seed always gives the same one, because time, randomness, the
network and every crash come from it. Keys are random, but nothing decides by their bytes.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from linkends import DEADLINE_S, Agenda, App, GatewayEnd, false_presence, new_gateway, presence
from linklab import Crash, CrashingDatabase
from linkweather import Setting, Weather

from tidegate.link import outbox
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
from tidegate.link.identity import load_device
from tidegate.link.messages import Status
from tidegate.link.outbox import Outbox, Outcome
from tidegate.link.prekeys import ModelOffer
from tidegate.link.registry import DeviceRegistry
from tidegate.link.timing import Timing
from tidegate.link.topics import GONE, HERE
from tidegate.link.transport import Message


@dataclass(kw_only=True)
class World(Agenda):
    """One device, one gateway or two, one broker that keeps retained adverts."""

    seed: int
    weather: Weather
    fleet: Path
    scratch: Path
    setting: Setting
    diverging: bool = False
    """The handler says something else at every run, from a random payload on."""
    runs: dict[RequestId, int] = field(default_factory=dict)
    crashes: int = 0

    def __post_init__(self) -> None:
        self.begin(random.Random(self.seed))
        self.timing = Timing(
            lease_s=20.0,
            advert_every_s=10.0,
            advert_valid_s=40.0,
            connect_timeout_s=3600.0,
            pacing=self.setting.pacing,
            tick_s=0.25,
            chunk_bytes=256,
            window=self.setting.window,
        )
        self.registry = DeviceRegistry(self.fleet / "gateway" / "devices.sqlite")
        self.device_disk = CrashingDatabase(self.scratch / f"d{self.seed}.sqlite", outbox.SCHEMA)
        self.device_identity = load_device(self.fleet / "device")
        numbers = range(self.setting.gateways)
        self.gateways = [new_gateway(self.fleet, self.scratch, self.seed, n) for n in numbers]
        self.up = True
        self.lost_way = ""
        """Part of the topics on which everything is lost now."""
        self.device: DeviceCore | None = None
        self.device_inbox: list[Message] = []
        self.apps: dict[RequestId, App] = {}
        self.expected: dict[RequestId, list[bytes]] = {}
        self.results: dict[RequestId, list[bytes]] = {}
        self.failures: dict[RequestId, str] = {}
        self.said: dict[RequestId, list[list[bytes]]] = {}
        self.sent: list[tuple[float, str, int]] = []
        """When, on which topic and how many bytes: two plays of a seed are the same in this."""
        self.life = itertools.count(1)
        for end in self.gateways:
            self.start_gateway(end)
        self.start_device()
        for every_s, action in (
            (self.weather.outage_every_s, self.cut),
            (self.weather.partition_every_s, self.split),
            (
                self.weather.clock_jump_every_s,
                lambda: self.jump(["device", *(end.name for end in self.gateways)]),
            ),
            (
                self.weather.presence_lie_every_s,
                lambda: self.publish(false_presence(self.rng, self.device_identity)),
            ),
            (self.weather.device_crash_every_s, lambda: self.device_disk.light(self.rng, 6)),
            (
                self.weather.gateway_crash_every_s,
                lambda: self.rng.choice(self.gateways).disk.light(self.rng, 6),
            ),
        ):
            if every_s:
                self.repeat(every_s, action, until_s=self.weather.calm_after_s)

    # Time.

    def run(self, answers: int, until_s: float) -> None:
        """Let time pass until so many requests have been read, or `until_s`."""
        while self.now_s < until_s and len(self.results) + len(self.failures) < answers:
            due = self.next_s(until_s)
            for core in (self.device, *(end.core for end in self.gateways)):
                if core is not None:
                    due = min(due, core.next_wakeup_s())
            self.now_s = max(self.now_s, due)
            self.act()
            self.on_device(lambda core: core.poll(self.now_s))
            for end in self.gateways:
                self.on_gateway(end, lambda core: core.poll(self.now_s))

    # The two ends.

    def start_device(self) -> None:
        try:
            self.device = DeviceCore(
                identity=self.device_identity,
                outbox=Outbox(self.device_disk),
                timing=self.timing,
                rng=self.rng,
                wall_s=lambda: self.wall_s("device"),
                now_s=self.now_s,
            )
        except Crash:
            self.die_device()
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
            self.tell_presence(HERE)
            self.device.on_connected(self.now_s)
            for end in self.gateways:
                if end.advert is not None:
                    self.deliver(end.advert)

    def start_gateway(self, end: GatewayEnd) -> None:
        end.life = life = next(self.life)
        end.core = GatewayCore(
            keys=GatewayKeys(
                identity=end.identity,
                prekeys=end.prekeys,
                registry=self.registry,
                wall_s=lambda: self.wall_s(end.name),
            ),
            store=GatewayStore(end.disk),
            timing=self.timing,
            max_requests=16,
            wall_s=lambda: self.wall_s(end.name),
            now_s=self.now_s,
        )
        end.handlers = {}
        self.advertise(end, life)

    def advertise(self, end: GatewayEnd, life: int) -> None:
        if life == end.life and end.core is not None:
            self.on_gateway(
                end, lambda core: [core.advert((ModelOffer(id="m", context_tokens=2048),), None)]
            )
            self.after(self.timing.advert_every_s, lambda: self.advertise(end, life))

    def die_device(self) -> None:
        self.crashes += 1
        self.device = None
        self.device_inbox = []
        self.tell_presence(GONE)
        self.after(self.rng.uniform(0.0, 4.0), self.start_device)

    def die_gateway(self, end: GatewayEnd) -> None:
        self.crashes += 1
        end.core = None
        end.inbox, end.outputs, end.handlers = [], [], {}
        self.after(self.rng.uniform(0.0, 4.0), lambda: self.start_gateway(end))

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
            self.die_device()

    def read(self, core: DeviceCore, request_id: RequestId, state: State) -> None:
        """The application keeps the answer, then lets the link forget it.

        Dying between the two shows it a request that it has: it only lets go again.
        """
        standing = core.standing(request_id)
        assert standing is not None
        if standing.outcome is Outcome.FAILED:
            self.failures[request_id] = standing.code
            core.release(request_id)
            return
        assert state is State.DONE, state
        assert request_id not in self.failures, "answered after it had failed"
        if self.results.setdefault(request_id, standing.payloads) != standing.payloads:
            raise AssertionError("the answer changed")
        core.release(request_id)

    def on_gateway(
        self, end: GatewayEnd, act: Callable[[GatewayCore], list[GatewayEffect]]
    ) -> None:
        if end.core is None:
            return
        try:
            for effect in act(end.core):
                match effect:
                    case Publish():
                        self.publish(effect, end)
                    case Start(run=run, request=request):
                        self.runs[request.request_id] = self.runs.get(request.request_id, 0) + 1
                        end.handlers[run] = list(self.answer_of_run(request.request_id))
                        self.produce_later(end, run, end.life)
                    case Stop(run):
                        end.handlers.pop(run, None)
                    case Release():
                        pass
        except Crash:
            self.die_gateway(end)

    def answer_of_run(self, request_id: RequestId) -> list[bytes]:
        answer = self.expected[request_id]
        if self.diverging:
            same = self.rng.randrange(len(answer) + 1)
            answer = answer[:same] + [self.rng.randbytes(8) for _ in answer[same:]]
        self.said.setdefault(request_id, []).append(list(answer))
        return answer

    def produce_later(self, end: GatewayEnd, run: RunId, life: int) -> None:
        def produce() -> None:
            left = end.handlers.get(run)
            if left is None or life != end.life:
                return
            count = min(len(left), self.rng.randrange(4))
            outputs: list[bytes | Finished] = [left.pop(0) for _ in range(count)]
            if not left:
                outputs.append(Finished(Status.COMPLETE))
            end.outputs += [Produced(run, output) for output in outputs]
            self.after(self.until_turn_s(), partial(self.turn_gateway, end))
            if left:
                self.produce_later(end, run, life)

        self.after(self.rng.uniform(0.0, 1.0), produce)

    # The network.

    def cut(self) -> None:
        """The broker goes away and comes back without memory of anything but its clients."""
        if not self.up:
            return
        self.up = False
        for end in self.gateways:
            end.advert = None
        if self.device is not None:
            self.device.on_disconnected()

        def restore() -> None:
            self.up = True
            for end in self.gateways:
                again = partial(self.advertise, end, end.life)
                self.after(self.rng.uniform(0.0, 1.0), again)
            self.after(self.rng.uniform(0.0, 1.0), self.connect_device)

        self.after(self.rng.uniform(0.1, 5.0), restore)

    def split(self) -> None:
        """One direction, or one gateway's, loses everything for a while."""
        ways = ["/q/", "/r/", "/advert", *(f"/gw/{end.name}/" for end in self.gateways)]
        self.lost_way = self.rng.choice(ways)
        self.after(self.rng.uniform(0.5, 15.0), lambda: setattr(self, "lost_way", ""))

    def tell_presence(self, word: bytes) -> None:
        """The broker tells every gateway how the device is."""
        if self.weather.presence_lie_every_s:
            self.publish(presence(self.rng, self.device_identity, word))

    def publish(self, message: Publish, end: GatewayEnd | None = None) -> None:
        self.sent.append((self.now_s, message.topic, len(message.payload)))
        if message.retain and end is not None and self.up:
            end.advert = message
        bad = self.now_s < self.weather.calm_after_s
        lost = bool(self.lost_way) and self.lost_way in message.topic
        if not self.up or lost or (bad and self.rng.random() < self.weather.drop):
            return
        copies = 2 if bad and self.rng.random() < self.weather.duplicate else 1
        for _ in range(copies):
            late = bad and self.rng.random() < self.weather.reorder
            delay_s = self.rng.uniform(0.5, 3.0) if late else 0.02
            copy = self.weather.damaged(message, self.rng) if bad else message
            self.after(delay_s, partial(self.deliver, copy))

    def deliver(self, message: Publish) -> None:
        if not self.up:
            return
        arrived = Message(message.topic, message.payload)
        to_all = "/s/" in arrived.topic
        if not to_all and "/q/" not in arrived.topic:
            self.device_inbox.append(arrived)
            self.after(self.until_turn_s(), self.turn_device)
            return
        for end in self.gateways:
            if (to_all or f"/gw/{end.name}/" in arrived.topic) and end.core is not None:
                end.inbox.append(arrived)
                self.after(self.until_turn_s(), partial(self.turn_gateway, end))

    # Turns: what has come together is taken together.

    def until_turn_s(self) -> float:
        return self.rng.choice((0.0, 0.0, 0.05))

    def turn_device(self) -> None:
        events, self.device_inbox = self.device_inbox, []
        may_send = self.rng.random() < 0.8
        self.on_device(lambda core: core.turn(self.now_s, events, may_send=may_send))

    def turn_gateway(self, end: GatewayEnd) -> None:
        messages, end.inbox = end.inbox, []
        outputs, end.outputs = end.outputs, []
        room_bytes = self.rng.choice((math.inf, math.inf, 300.0, 0.0))
        self.on_gateway(
            end, lambda core: core.turn(self.now_s, messages, outputs, room_bytes=room_bytes)
        )

    # The application.

    def ask(self, payloads: int) -> None:
        """Submit a request; a crash while doing so makes the application try again."""
        request_id = new_request_id(int(self.wall_s("device") * 1000))
        answer = [b"%d:" % i + self.rng.randbytes(self.rng.randrange(80)) for i in range(payloads)]
        self.expected[request_id] = answer
        self.submit(request_id)

    def submit(self, request_id: RequestId) -> None:
        def submit(core: DeviceCore) -> list[DeviceEffect]:
            over = request_id in self.results or request_id in self.failures
            if not over and core.standing(request_id) is None:
                core.submit(
                    self.now_s,
                    b"prompt",
                    request_id=request_id,
                    deadline_s=DEADLINE_S,
                    model=None,
                    priority=len(self.expected[request_id]) % 3,
                )
                self.apps[request_id] = App()
            return []

        self.on_device(submit)
        if request_id not in self.apps and request_id not in self.results:
            self.after(1.0, lambda: self.submit(request_id))

    def close(self) -> None:
        for disk in (self.device_disk, *(end.disk for end in self.gateways)):
            disk.close()
        self.registry.close()
