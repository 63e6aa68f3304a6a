"""What a seeded man in the middle does to MQTT: decisions and handshakes, without a socket.

Only what a network or a bad broker could really do happens. TCP loses and reorders nothing, but
brokers do: one that is killed forgets messages it had acknowledged, so a dropped message of QoS 1
or 2 is acknowledged to its sender and never seen again; one with several shards lets messages
overtake each other. A repeated message is what a sender repeats: DUP set, the same packet id.
Handshakes stay whole: packet ids are the sender's, and of two acknowledgements one arrives.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, fields
from enum import Enum

from mqttframes import (
    FrameKind,
    Publish,
    acknowledgement,
    kind_of,
    packet_id_of,
    parse_publish,
    protocol_level,
)

HELD_FRAMES = 8
"""Messages that may wait in one direction of a connection to be overtaken."""


class Direction(Enum):
    """Which way a frame goes."""

    UP = "up"
    """From a client to the broker."""
    DOWN = "down"

    @property
    def other(self) -> Direction:
        return Direction.DOWN if self is Direction.UP else Direction.UP


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Chance, 0 to 1, of each accident per PUBLISH and hop; a message makes two hops."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    corrupt: float = 0.0
    cut: float = 0.0
    partition: float = 0.0
    delay_s: float = 0.05
    """The longest delay; it holds up what comes behind."""
    partition_s: float = 1.0
    """How long nothing passes, in either direction, for anybody."""
    hold_s: float = 0.1
    """A message that nothing overtakes in this time goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What happens to one PUBLISH."""

    drop: bool = False
    duplicate: bool = False
    reorder: bool = False
    corrupt: tuple[float, int] | None = None
    """Where along the payload, 0 to 1, and which bit."""
    delay_s: float = 0.0
    cut: bool = False
    partition: bool = False


@dataclass(kw_only=True, slots=True)
class Deeds:
    """What was done, and how much passed. Bytes and messages are those of PUBLISH frames."""

    connections: int = 0
    messages_up: int = 0
    messages_down: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    dropped: int = 0
    duplicated: int = 0
    reordered: int = 0
    delayed: int = 0
    corrupted: int = 0
    cut: int = 0
    partitioned: int = 0
    malformed: int = 0

    def since(self, earlier: Deeds) -> Deeds:
        """The difference of two counts."""
        names = [one.name for one in fields(self)]
        return Deeds(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


class Plan:
    """Decides by seed and packet number, so the same traffic meets the same fate again."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.faults = faults
        self._seed = seed

    def fate(self, direction: Direction, number: int) -> Fate:
        """Of the `number`-th PUBLISH in `direction`, over all connections."""
        faults = self.faults
        rng = random.Random(f"{self._seed}/{direction.value}/{number}")
        rolls = [rng.random() for _ in range(7)]
        place, bit = rng.random(), rng.randrange(8)
        return Fate(
            drop=rolls[0] < faults.drop,
            duplicate=rolls[1] < faults.duplicate,
            reorder=rolls[2] < faults.reorder,
            corrupt=(place, bit) if rolls[3] < faults.corrupt else None,
            delay_s=faults.delay_s * place if rolls[4] < faults.delay else 0.0,
            cut=rolls[5] < faults.cut,
            partition=rolls[6] < faults.partition,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What to do about one frame, in this order: wait, pass on, answer, then cut."""

    forward: tuple[bytes, ...] = field(default=(), repr=False)
    back: tuple[bytes, ...] = field(default=(), repr=False)
    """For the sender of the frame."""
    delay_s: float = 0.0
    cut: bool = False
    partition: bool = False


class Exchange:
    """Both directions of one connection. `plan` and `deeds` belong to the whole proxy."""

    def __init__(self, plan: Plan, deeds: Deeds) -> None:
        self._plan = plan
        self._deeds = deeds
        self._level = 4
        self._held: dict[Direction, list[bytes]] = {one: [] for one in Direction}
        self._swallow: Counter[tuple[Direction, int]] = Counter()
        """Acknowledgements that will be one too many, by where their message went."""
        self._lost: set[tuple[Direction, int]] = set()
        """QoS 2 messages that we dropped and whose PUBREL is to come."""

    def holds(self, direction: Direction) -> int:
        """How many messages wait to be overtaken."""
        return len(self._held[direction])

    def release(self, direction: Direction) -> tuple[bytes, ...]:
        """What waited long enough, in the order in which it came."""
        held, self._held[direction] = self._held[direction], []
        return tuple(held)

    def receive(self, direction: Direction, frame: bytes) -> Step:
        """A whole frame came from the sender of `direction`.

        Raises:
            FrameError: it is a PUBLISH that cannot be read.
        """
        match kind_of(frame):
            case FrameKind.PUBLISH:
                return self._publish(direction, parse_publish(frame, self._level))
            case FrameKind.PUBACK | FrameKind.PUBREC:
                key = (direction.other, packet_id_of(frame))
                if self._swallow[key] > 0:
                    self._swallow[key] -= 1
                    return Step()
            case FrameKind.PUBREL:
                packet_id = packet_id_of(frame)
                if (direction, packet_id) in self._lost:
                    self._lost.remove((direction, packet_id))
                    return Step(back=(acknowledgement(FrameKind.PUBCOMP, packet_id),))
            case FrameKind.CONNECT:
                self._level = protocol_level(frame)
            case FrameKind.DISCONNECT:
                return Step(forward=(*self.release(direction), frame))
        return Step(forward=(frame,))

    def _publish(self, direction: Direction, message: Publish) -> Step:
        fate = self._plan.fate(direction, self._count(direction, message))
        delay_s = fate.delay_s
        self._deeds.delayed += delay_s > 0
        if message.aliased:
            # Whoever set the alias relies on this frame; only time may be lost.
            return Step(forward=(message.raw, *self.release(direction)), delay_s=delay_s)
        if fate.cut:
            # Whatever waits or is on its way goes down with the connection.
            self._deeds.cut += 1
            return Step(cut=True, partition=fate.partition)
        if fate.drop:
            return Step(back=self._drop(direction, message), partition=fate.partition)
        return Step(
            forward=self._pass_on(direction, message, fate),
            delay_s=delay_s,
            partition=fate.partition,
        )

    def _count(self, direction: Direction, message: Publish) -> int:
        """The number of this message in its direction."""
        deeds = self._deeds
        if direction is Direction.UP:
            deeds.messages_up += 1
            deeds.bytes_up += len(message.raw)
            return deeds.messages_up
        deeds.messages_down += 1
        deeds.bytes_down += len(message.raw)
        return deeds.messages_down

    def _drop(self, direction: Direction, message: Publish) -> tuple[bytes, ...]:
        """Lose it as a broker does that dies after it acknowledged."""
        self._deeds.dropped += 1
        if message.qos == 0:
            return ()
        if message.qos == 1:
            return (acknowledgement(FrameKind.PUBACK, message.packet_id),)
        self._lost.add((direction, message.packet_id))
        return (acknowledgement(FrameKind.PUBREC, message.packet_id),)

    def _pass_on(self, direction: Direction, message: Publish, fate: Fate) -> tuple[bytes, ...]:
        frames = [message.raw]
        if fate.corrupt is not None:
            self._deeds.corrupted += 1
            frames = [message.damaged(*fate.corrupt)]
        if fate.duplicate:
            self._deeds.duplicated += 1
            frames.append(message.repeated())
            if message.qos:
                # The first of two acknowledgements is swallowed: until the second one arrives the
                # sender cannot use the id for anything else.
                self._swallow[direction, message.packet_id] += 1
        held = self._held[direction]
        if fate.reorder and len(held) + len(frames) <= HELD_FRAMES:
            self._deeds.reordered += 1
            held += frames
            return ()
        return (*frames, *self.release(direction))
