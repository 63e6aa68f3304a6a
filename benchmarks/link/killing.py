"""One run of requests while broker, gateway and device are killed by a seeded schedule.

What a run has seen is on disk as it goes, so that one that was interrupted goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from chaosplan import Deeds, Faults
from chaosproxy import ChaosProxy
from link.children import ROLES, Child, Role, free_port, mosquitto, python, wait_listening
from link.ledger import Entry, LedgerReader, Tally, tally
from link.settings import Settings, Way

from tidegate.link.fleet import pair

HERE = Path(__file__).resolve().parent
LOOK_S = 0.02
REMEMBER_S = 1.0
START_S = 20.0
RECOVERY_S = 30.0
"""The next kill waits so long for an answer after the last one."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One planned death: after so many requests were submitted, for so long."""

    after: int
    victim: Role
    down_s: float


@dataclass(frozen=True, kw_only=True)
class Death:
    """One that happened. `recovery_s` is None when nothing was answered before the next one."""

    victim: Role
    down_s: float
    recovery_s: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One way, measured."""

    way: Way
    tally: Tally
    deaths: list[Death]
    deeds: Deeds
    seconds: float
    needed_bytes: float
    """Per request, in calm."""
    finished: bool
    """All requests ended; False when the time limit came first."""

    @property
    def sent_over_needed(self) -> float:
        submitted = max(1, self.tally.submitted)
        return self.deeds.bytes_up / submitted / self.needed_bytes

    def recovery_s(self, share: float) -> float | None:
        times = sorted(one.recovery_s for one in self.deaths if one.recovery_s is not None)
        return times[min(len(times) - 1, int(share * len(times)))] if times else None


def schedule(seed: int, requests: int, kills: int) -> list[Kill]:
    """Evenly spread over the requests, give or take; in order."""
    rng = random.Random(f"kills {seed}")
    step = requests / (kills + 1)
    return [
        Kill(
            after=max(1, round(step * (number + 1 + rng.uniform(-0.4, 0.4)))),
            victim=rng.choice(ROLES),
            down_s=rng.uniform(0.2, 1.5),
        )
        for number in range(kills)
    ]


class Run:
    """One way under one schedule. What it has seen is on disk, so that it can go on."""

    def __init__(
        self, settings: Settings, broker_port: int, proxy: ChaosProxy, planned: Sequence[Kill]
    ) -> None:
        self._settings = settings
        self._broker_port = broker_port
        self._proxy = proxy
        self._planned = planned
        folder = settings.folder
        self._past = folder / "past.json"
        self._deaths: list[Death] = []
        self._before = Deeds()
        self._seconds_before = 0.0
        if self._past.exists():
            past = json.loads(self._past.read_text())
            self._deaths = [Death(**one) for one in past["deaths"]]
            self._before = Deeds(**past["deeds"])
            self._seconds_before = past["seconds"]
        worker = "worker_sealed.py" if settings.way == "sealed" else "worker_plain.py"
        told = str(settings.write())
        self._children: dict[Role, Child] = {
            "broker": mosquitto(folder, broker_port),
            "gateway": self._worker(worker, "gateway", told),
            "device": self._worker(worker, "device", told),
        }
        self._entries: list[Entry] = []
        self._reader = LedgerReader(settings.ledger)
        self._began_s = time.monotonic()
        self._remembered_s = self._began_s
        self._restarted_s: float | None = None
        """Of the last death, while nothing has been answered since."""

    def _worker(self, script: str, role: Role, told: str) -> Child:
        log = self._settings.folder / f"{role}.log"
        return Child(role, python(str(HERE / script), role, told), log)

    async def play(self, limit_s: float) -> bool:
        """True when every request has ended; the children are gone in any case."""
        try:
            for role in ROLES:
                await self._start(role)
            self._look()
            async with asyncio.timeout(limit_s):
                for kill in self._planned[len(self._deaths) :]:
                    if not await self._until(kill.after):
                        break
                    await self._kill(kill)
                await self._until(None)
            return True
        except TimeoutError:
            return False
        finally:
            for child in self._children.values():
                child.kill()
            self._look()
            self._remember()

    def outcome(self, needed_bytes: float, finished: bool) -> Outcome:
        runs = list(LedgerReader(self._settings.runs).fresh())
        return Outcome(
            way=self._settings.way,
            tally=tally(self._entries + runs),
            deaths=self._deaths,
            deeds=self._deeds(),
            seconds=self._seconds(),
            needed_bytes=needed_bytes,
            finished=finished,
        )

    async def _start(self, role: Role) -> None:
        """Start it, and wait until the others can count on it as anybody would arrange for."""
        self._children[role].start()
        if role == "broker":
            await asyncio.to_thread(wait_listening, self._broker_port)
        if role == "gateway" and self._settings.way != "sealed":
            # Nobody keeps a plain message for a session that was never there.
            async with asyncio.timeout(START_S):
                while not self._settings.subscribed.exists():
                    await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        """Read what the application has noted since, and see whether it is served again."""
        for entry in self._reader.fresh():
            self._entries.append(entry)
            since_s = self._restarted_s
            if since_s is not None and entry.what == "answered" and entry.t_s >= since_s:
                self._deaths[-1] = replace(self._deaths[-1], recovery_s=entry.t_s - since_s)
                self._restarted_s = None
                self._remember()

    @property
    def _submitted(self) -> int:
        return sum(entry.what == "submitted" for entry in self._entries)

    async def _until(self, submitted: int | None) -> bool:
        """Wait for so many submissions, and for what died last to be of use again.

        With None, until the device is done. False when it is done before.
        """
        while submitted is None or self._submitted < submitted or self._recovering:
            self._look()
            if time.monotonic() > self._remembered_s + REMEMBER_S:
                self._remember()
            status = self._children["device"].ended
            if status == 0:
                return False
            for child in self._children.values():
                if child.ended is not None:
                    raise SystemExit(
                        f"the {child.name} ended by itself: {child.ended}; see its log"
                    )
            await asyncio.sleep(LOOK_S)
        return True

    @property
    def _recovering(self) -> bool:
        since_s = self._restarted_s
        return since_s is not None and time.monotonic() < since_s + RECOVERY_S

    async def _kill(self, kill: Kill) -> None:
        child = self._children[kill.victim]
        self._look()
        self._restarted_s = None
        child.kill()
        await asyncio.sleep(kill.down_s)
        await self._start(kill.victim)
        self._restarted_s = time.monotonic()
        self._deaths.append(Death(victim=kill.victim, down_s=kill.down_s, recovery_s=None))
        self._remember()

    def _deeds(self) -> Deeds:
        sums = asdict(self._before)
        for name, count in asdict(self._proxy.deeds).items():
            sums[name] += count
        return Deeds(**sums)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began_s

    def _remember(self) -> None:
        past = {
            "deaths": [asdict(one) for one in self._deaths],
            "deeds": asdict(self._deeds()),
            "seconds": self._seconds(),
        }
        fresh = self._past.with_suffix(".new")
        fresh.write_text(json.dumps(past), encoding="utf-8")
        fresh.replace(self._past)
        self._remembered_s = time.monotonic()


async def run_way(
    settings: Settings, seed: int, faults: Faults, planned: Sequence[Kill], limit_s: float
) -> tuple[Run, bool]:
    """Play one way in its folder, behind a proxy of its own."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    if settings.way == "sealed":
        pair(settings.folder / "device", settings.folder / "gateway")
    port = free_port()
    proxy = ChaosProxy(port, seed=seed, faults=faults)
    async with proxy.running():
        run = Run(replace(settings, url=proxy.url), port, proxy, planned)
        finished = await run.play(limit_s)
    return run, finished
