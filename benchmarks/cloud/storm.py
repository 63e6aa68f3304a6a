"""Three thousand mixed requests to the cloud service, with two SIGTERMs and new lives in between.

A real `tidegate cloud` behind API keys, and clients that stream, wait, read slowly, leave at once
or in the middle, send nonsense, are over their rate or have no key. Every request has to end once,
as its client sees it: a whole answer, an error object, or its own leaving; who finds the service
away or without room comes again. Well-behaved answers are compared with those of a calm before the
storm, and their times are told beside those of as many well-behaved clients alone. Memory is held
against the beginning of each life; at the end nothing may run, wait, hold KV or be a task that was
not there before.

    python benchmarks/cloud/storm.py --keep benchmarks/results/cloud-storm.json
    python benchmarks/cloud/storm.py --requests 200 --model FOLDER --tokens 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from cloud.processes import TIDEGATE, ServiceProcess, run  # noqa: E402
from cloud.storm_client import Asked, Exchange, exchange  # noqa: E402
from cloud.storm_mix import (  # noqa: E402
    GOOD,
    WORDS,
    Keys,
    Planned,
    different,
    judge,
    percentile,
    plan,
    planned,
    should_retry,
    text_of,
)
from peers.rounds import tell  # noqa: E402
from report import report  # noqa: E402

MODEL = ROOT / "examples" / "assistant" / "cloud"
LIVES = 3
MOST_GROWTH = 1.05
_WRONG_IN_LOG = re.compile(r"ERROR|CRITICAL|Traceback|never retrieved|was destroyed|Exception in")
_AWAY_S = 0.2
_RETRY_FOR_S = 180.0


@dataclass(kw_only=True)
class Record:
    """What was seen."""

    ends: Counter[str] = field(default_factory=Counter)
    """By kind and end."""
    wrong: list[str] = field(default_factory=list)
    different: int = 0
    compared: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    """Of well-behaved streams that were not sent away, to the first byte."""
    total_s: list[float] = field(default_factory=list)
    """Of well-behaved whole answers, likewise."""


@dataclass(kw_only=True)
class Life:
    """One process."""

    rss_mib: list[float] = field(default_factory=list)
    exit_status: int | None = None
    stopped_within_s: float | None = None

    @property
    def growth(self) -> float | None:
        """Of the last tenth of samples over the second, by their medians; None with too few."""
        tenth = len(self.rss_mib) // 10
        if tenth < 1:
            return None
        first, last = self.rss_mib[tenth : 2 * tenth], self.rss_mib[-tenth:]
        return sorted(last)[tenth // 2] / sorted(first)[tenth // 2]


class Storm:
    """The service's address and what its clients have seen; the process behind it may change."""

    def __init__(self, args: argparse.Namespace, keys: Keys, folder: Path) -> None:
        self.args, self.keys, self.folder = args, keys, folder
        self.port = 0
        self.calm: dict[str, str] = {}
        self.lives: list[Life] = []
        self.service: ServiceProcess | None = None

    def start(self) -> None:
        """Begin a life, on the port that the first one got."""
        flags = ("--rows", "8", "--context", "512", "--drain", "30", "--state", self.state)
        listen = ("--listen", f"127.0.0.1:{self.port}")
        command = [*TIDEGATE, "cloud", str(self.args.model), "--name", "m", *listen, *flags]
        self.service = ServiceProcess(command, self.folder / "log").__enter__()
        self.port = self.service.port
        self.lives.append(Life())

    @property
    def state(self) -> str:
        return str(self.folder / "state")

    def stop(self) -> None:
        """SIGTERM, until it has ended."""
        assert self.service is not None
        began_s = time.perf_counter()
        self.lives[-1].exit_status = self.service.stop()
        self.lives[-1].stopped_within_s = round(time.perf_counter() - began_s, 2)

    async def ask(self, wanted: Planned, record: Record) -> Exchange:
        """Ask until it ends, and judge that."""
        retries, deadline_s = 0, time.perf_counter() + _RETRY_FOR_S
        while True:
            one = await exchange(self.port, wanted.asked)
            if not should_retry(one) or time.perf_counter() > deadline_s:
                break
            retries += 1
            record.retries["away" if one.status is None else f"status {one.status}"] += 1
            await asyncio.sleep(_AWAY_S)
        kind = wanted.asked.kind
        end, problem = judge(one, wanted)
        record.ends[f"{kind}: {end}"] += 1
        if problem is not None:
            record.wrong.append(f"{kind}: {problem}")
        elif kind in GOOD and end == "answer":
            record.compared += 1
            record.different += bool(self.calm) and different(one, wanted, self.calm)
            if not retries and one.first_s is not None and kind in ("stream", "whole"):
                (record.first_s if kind == "stream" else record.total_s).append(
                    one.first_s if kind == "stream" else one.total_s
                )
        return one

    async def learn(self) -> None:
        """What well-behaved requests are answered when nothing else happens."""
        rng, record = random.Random(0), Record()
        for kind in ("whole", "json"):
            for words in WORDS:
                wanted = planned(kind, rng, self.keys, self.args.tokens)
                body = json.loads(wanted.asked.content)
                body |= {"stream": False, "messages": [{"role": "user", "content": words}]}
                asked = Asked(kind=kind, content=json.dumps(body).encode(), key=self.keys.good)
                one = await self.ask(Planned(asked=asked, words=words, statuses=(200,)), record)
                assert not record.wrong, record.wrong
                self.calm[words if kind == "whole" else f"json/{words}"] = text_of(one)

    async def clients(self, requests: Iterator[Planned], record: Record) -> None:
        """As many clients as there are, each with one request at a time."""

        async def client() -> None:
            for wanted in requests:
                await self.ask(wanted, record)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.args.clients):
                tasks.create_task(client())

    async def quiet(self) -> dict[str, Any]:
        """`/status`, once nobody is left to be answered."""
        asked = Asked(kind="status", content=b"", key=self.keys.good, path="/status", method="GET")
        for _ in range(200):
            one = await exchange(self.port, asked)
            engine = one.json["engine"]
            if engine["running"] + engine["waiting"] == 0 and engine["kv_usage"] == 0:
                break
            await asyncio.sleep(0.05)
        return dict(one.json)


async def storm(weather: Storm) -> dict[str, Any]:
    """The whole run; what it found."""
    args = weather.args
    await asyncio.to_thread(weather.start)
    await weather.learn()
    rng = random.Random(args.seed)
    kinds = ("stream", "whole")
    calm = Record()
    few = (planned(rng.choice(kinds), rng, weather.keys, args.tokens) for _ in range(args.calm))
    await weather.clients(few, calm)
    before = await weather.quiet()

    record, issued = Record(), 0
    turns = {args.requests * turn // LIVES for turn in range(1, LIVES)}
    restarts: list[asyncio.Task[None]] = []

    async def new_life() -> None:
        await asyncio.to_thread(weather.stop)
        await asyncio.to_thread(weather.start)

    def requests() -> Iterator[Planned]:
        nonlocal issued
        while issued < args.requests:
            if issued in turns:
                turns.discard(issued)
                tell(f"{issued} requests: SIGTERM")
                restarts.append(asyncio.create_task(new_life()))
            issued += 1
            yield plan(rng, weather.keys, args.tokens)

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.25)
            assert weather.service is not None
            rss_mib = weather.service.rss_mib()
            if rss_mib is not None:
                weather.lives[-1].rss_mib.append(round(rss_mib, 1))

    watching = asyncio.create_task(watch())
    began_s = time.perf_counter()
    await weather.clients(requests(), record)
    took_s = time.perf_counter() - began_s
    await asyncio.gather(*restarts)
    after = await weather.quiet()
    watching.cancel()
    await asyncio.to_thread(weather.stop)
    return told(weather, calm, record, before, after, took_s)


def told(
    weather: Storm,
    calm: Record,
    record: Record,
    before: dict[str, Any],
    after: dict[str, Any],
    took_s: float,
) -> dict[str, Any]:
    """Everything that is kept."""
    log = (weather.folder / "log").read_text(errors="replace").splitlines()
    engine = after["engine"]
    growths = [life.growth for life in weather.lives]
    left = {name: engine[name] for name in ("running", "waiting", "kv_usage")}
    checks = {
        "every request ended once": not record.wrong
        and record.ends.total() == weather.args.requests,
        "well-behaved answers as in a calm": record.compared > 0 and record.different == 0,
        "nothing runs, waits or holds KV": not any(left.values()),
        "no task left": after["process"]["tasks"] <= before["process"]["tasks"],
        "every life ended with status 0": all(life.exit_status == 0 for life in weather.lives),
        "memory flat": all(one is None or one <= MOST_GROWTH for one in growths),
        "no error in the log": not any(_WRONG_IN_LOG.search(line) for line in log),
    }
    return {
        "requests": weather.args.requests,
        "seconds": round(took_s, 1),
        "ends": dict(sorted(record.ends.items())),
        "wrong": record.wrong[:20],
        "retries": dict(record.retries),
        "compared": record.compared,
        "different": record.different,
        "seconds_alone": _times(calm),
        "seconds_in_the_storm": _times(record),
        "left": left,
        "process_before": before["process"],
        "process_after": after["process"],
        "lives": [
            {
                "rss_mib_first_last": [life.rss_mib[0], life.rss_mib[-1]] if life.rss_mib else [],
                "growth": None if life.growth is None else round(life.growth, 4),
                "exit_status": life.exit_status,
                "stopped_within_s": life.stopped_within_s,
            }
            for life in weather.lives
        ],
        "log_lines_wrong": [line for line in log if _WRONG_IN_LOG.search(line)][:10],
        "checks": checks,
    }


def _times(record: Record) -> dict[str, float]:
    found = {}
    for name, values in (("first byte", record.first_s), ("whole answer", record.total_s)):
        if values:
            found[f"{name} p50"] = round(percentile(values, 0.5), 3)
            found[f"{name} p95"] = round(percentile(values, 0.95), 3)
    return found


def make_keys(state: Path) -> Keys:
    """A key without limits that may see `/status`, and one of twelve requests a minute."""

    def key(name: str, *flags: str) -> str:
        made = run(*TIDEGATE, "keys", "api", "add", str(state), name, "--json", *flags)
        return str(json.loads(made)["key"])

    everything = ("--scope", "chat", "--scope", "completions", "--scope", "admin")
    return Keys(
        good=key("good", *everything),
        tight=key("tight", "--scope", "chat", "--requests", "12/minute/sliding"),
    )


def main() -> int:
    """Storm, print, keep; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--calm", type=int, default=200, help="well-behaved requests before")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=12, help="of an answer")
    parser.add_argument("--model", type=Path, default=MODEL, help="the demo's by default")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weather = Storm(args, make_keys(folder / "state"), folder)
        try:
            found = asyncio.run(storm(weather))
        finally:
            if weather.service is not None:
                weather.service.stop()
    text = report("cloud/storm.py", ("h11", "starlette", "torch", "uvicorn"), found)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else table(found))
    return 0 if all(found["checks"].values()) else 1


def table(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{found['requests']} requests in {found['seconds']} s, retries {found['retries']}"]
    lines += [f"  {count:>6}  {end}" for end, count in found["ends"].items()]
    lines += [
        f"alone        {found['seconds_alone']}",
        f"in the storm {found['seconds_in_the_storm']}",
    ]
    lines += [f"life {number + 1}: {life}" for number, life in enumerate(found["lives"])]
    lines += [f"process before {found['process_before']}, after {found['process_after']}"]
    lines += [
        f"{'met' if good else 'MISSED':<7} {check}" for check, good in found["checks"].items()
    ]
    return "\n".join([*lines, *found["wrong"], *found["log_lines_wrong"]])


if __name__ == "__main__":
    sys.exit(main())
