"""What is lost when everything dies: broker, gateway and device killed under load.

Streamed requests over a real mosquitto behind a proxy that loses, repeats, reorders and cuts
(`tests/support/chaosplan.py` says how); all three processes are SIGKILLed at random moments of one
seeded schedule, which goes by how many requests were submitted. The answers come from an echo, so
every byte is known beforehand. The same schedule then meets plain paho at QoS 1 and QoS 2.

    lost        no end, or only that time was up: the measure is the same for all three ways
    recovery    from a restart (the process starts, the broker listens) to the next whole answer
    sent/needed bytes of MQTT messages both ends sent, per request, over those of a calm run

An interrupted run goes on where it was when the same command is given again.

    python benchmarks/link/kills.py --requests 5000 --kills 60 \
        --keep benchmarks/results/link-kills.json
    python benchmarks/link/kills.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from link.children import (  # noqa: E402
    ROLES,
    Child,
    Role,
    free_port,
    import_paths,
    mosquitto,
    python,
    wait_listening,
)

sys.path[1:1] = import_paths()

from chaosplan import Deeds, Faults  # noqa: E402
from chaosproxy import ChaosProxy  # noqa: E402
from link.ledger import Entry, LedgerReader, Tally, tally  # noqa: E402
from link.settings import TIMINGS, WAYS, Settings, Way  # noqa: E402
from report import report  # noqa: E402

from tidegate.link.fleet import pair  # noqa: E402

LOOK_S = 0.02
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


async def measure(way: Way, args: argparse.Namespace, work: Path) -> Outcome:
    """A calm run for what is needed, then the real one."""
    settings = Settings(
        folder=work / f"{way}-calm",
        url="",
        way=way,
        requests=args.calm,
        together=args.together,
        words=args.words,
        word_s=args.word_ms / 1000,
        deadline_s=args.deadline_s if way == "sealed" else args.patience_s,
        waits=args.waits,
    )
    shutil.rmtree(settings.folder, ignore_errors=True)
    calm, _ = await run_way(settings, args.seed, Faults(), (), limit_s=120.0)
    needed = calm.outcome(1.0, True)
    if needed.tally.answered_once != args.calm:
        raise SystemExit(f"{way}: the calm run went wrong: {needed.tally}; see {settings.folder}")
    faults = Faults(
        drop=args.drop,
        duplicate=args.duplicate,
        reorder=args.reorder,
        corrupt=args.corrupt,
        cut=args.cut,
    )
    planned = schedule(args.seed, args.requests, args.kills)
    settings = replace(settings, folder=work / way, requests=args.requests)
    run, finished = await run_way(settings, args.seed, faults, planned, args.limit_s)
    return run.outcome(needed.deeds.bytes_up / args.calm, finished)


def table(outcomes: Sequence[Outcome]) -> str:
    """The same columns for every way."""
    rows: list[tuple[str, list[object]]] = [
        ("submitted", [one.tally.submitted for one in outcomes]),
        ("answered exactly once", [one.tally.answered_once for one in outcomes]),
        ("failed cleanly", [one.tally.failed for one in outcomes]),
        ("lost", [one.tally.lost for one in outcomes]),
        ("duplicated", [one.tally.duplicated for one in outcomes]),
        ("wrong", [one.tally.wrong for one in outcomes]),
        ("generated more than once", [one.tally.ran_again for one in outcomes]),
        ("chunks the application sorted out", [one.tally.repeated_chunks for one in outcomes]),
        ("kills", [len(one.deaths) for one in outcomes]),
        (
            "recovered before the next",
            [sum(d.recovery_s is not None for d in o.deaths) for o in outcomes],
        ),
        ("recovery p50, s", [_shown(one.recovery_s(0.5)) for one in outcomes]),
        ("recovery p99, s", [_shown(one.recovery_s(0.99)) for one in outcomes]),
        ("kB needed per request", [_shown(one.needed_bytes / 1000) for one in outcomes]),
        ("sent / needed", [_shown(one.sent_over_needed) for one in outcomes]),
        ("minutes", [_shown(one.seconds / 60) for one in outcomes]),
    ]
    lines = [f"{'':36}" + "".join(f"{one.way:>10}" for one in outcomes)]
    lines += [f"{name:36}" + "".join(f"{value!s:>10}" for value in row) for name, row in rows]
    lines += [f"{one.way}: the time limit came first" for one in outcomes if not one.finished]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def body(outcome: Outcome) -> dict[str, object]:
    """What is kept of a way."""
    return {
        **asdict(outcome),
        "kills": len(outcome.deaths),
        "kills_by_victim": {r: sum(d.victim == r for d in outcome.deaths) for r in ROLES},
        "recovery_p50_s": outcome.recovery_s(0.5),
        "recovery_p99_s": outcome.recovery_s(0.99),
        "sent_over_needed": outcome.sent_over_needed,
    }


def main() -> int:
    """Measure and print; keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--calm", type=int, default=60, help="requests to learn what is needed")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", type=int, default=16, help="requests at a time")
    parser.add_argument("--words", type=int, default=24, help="of an answer, a chunk each")
    parser.add_argument("--word-ms", type=float, default=10.0)
    parser.add_argument("--drop", type=float, default=0.02, help="chance per message and hop")
    parser.add_argument("--duplicate", type=float, default=0.05)
    parser.add_argument("--reorder", type=float, default=0.05)
    parser.add_argument("--corrupt", type=float, default=0.0)
    parser.add_argument("--cut", type=float, default=0.0005)
    parser.add_argument("--waits", choices=TIMINGS, default="default", help="the link's Timing")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="of the sealed way")
    parser.add_argument("--patience-s", type=float, default=20.0, help="of the plain ways")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="per way")
    parser.add_argument(
        "--work", type=Path, default=HERE.parents[1] / ".tidegate" / "bench" / "kills"
    )
    parser.add_argument("--quick", action="store_true", help="60 requests, 4 kills")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.kills, args.waits = 60, 4, "fast"
    plan = {
        k: v for k, v in vars(args).items() if k not in ("work", "keep", "json", "limit_s", "ways")
    }
    work = resumable(args.work, plan)
    outcomes = []
    for way in args.ways:
        print(f"{way} ...", file=sys.stderr, flush=True)
        outcomes.append(asyncio.run(measure(way, args, work)))
        print(table(outcomes[-1:]), file=sys.stderr, flush=True)
    settings = {
        **plan,
        "schedule": [asdict(k) for k in schedule(args.seed, args.requests, args.kills)],
    }
    results = {"settings": settings, "ways": [body(one) for one in outcomes]}
    text = report("link/kills.py", ("cryptography", "paho-mqtt"), results)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else table(outcomes))
    if all(one.finished for one in outcomes):
        shutil.rmtree(work)
    ours = [one.tally for one in outcomes if one.way == "sealed"]
    return int(any(one.lost or one.duplicated or one.wrong for one in ours))


def resumable(work: Path, plan: dict[str, object]) -> Path:
    """The folder of this very plan: an interrupted run goes on, another one starts afresh."""
    told = json.dumps(plan, sort_keys=True)
    known = work / "plan.json"
    if not known.exists() or known.read_text() != told:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        known.write_text(told)
    return work


if __name__ == "__main__":
    sys.exit(main())
