"""What the link costs: microseconds of sealing, milliseconds of latency, many streams, memory.

envelope  sealing and opening a request of 1 kB, and one chunk of an answer, by turns, medians
latency   from a chunk's due time to the application, over mosquitto on loopback, with the
          40 ms tick off, by turns with the same transport without the link in between
streams   300 at once at 20 chunks/s from one gateway to ten devices, with the tick on
memory    gateway and device over an hour's messages (a request of 120 chunks every 5 s), as
          fast as they go

python benchmarks/link/cost.py --keep benchmarks/results/link-cost.json
python benchmarks/link/cost.py --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from link.children import free_port, import_paths, mosquitto, python, start, wait_listening  # noqa: E402

sys.path[1:1] = import_paths()

import psutil  # noqa: E402
from linklab import new_peers  # noqa: E402
from peers.bars import Bar  # noqa: E402
from report import report  # noqa: E402

from tidegate.link.fleet import add_device, add_gateway, create_fleet  # noqa: E402

REQUEST_MS, CHUNK_US, ADDED_MS, RSS_GROWTH = 0.6, 5.0, 3.0, 1.05
"""The bars of the link's issue."""
SUSTAINED = 1.05
"""Many streams may take so much longer than their chunks are due: else they fall behind."""
STREAMS, RATE, DEVICES = 300, 20.0, 10
HOUR_REQUESTS, HOUR_CHUNKS = 720, 120
SETTLED = 0.2
"""Share of an hour after which memory must not grow: what is bounded has filled by then."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the largest."""
    ordered = sorted(values)
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
        "count": len(ordered),
    }


def envelope(rounds: int) -> dict[str, object]:
    """Seconds per call, by turns; each figure is the median over the rounds."""
    peers = new_peers()
    body, chunk = bytes(1000), bytes(60)

    def request() -> None:
        message, _ = peers.seal(body)
        peers.open(message)

    message, device = peers.seal(body)
    gateway = peers.open(message)

    def response() -> None:
        device.open_response(gateway.seal_response(chunk, final=False))

    times: dict[str, list[float]] = {"request": [], "chunk": []}
    for _ in range(rounds):
        times["request"].append(timed(request, 20))
        times["chunk"].append(timed(response, 1000))
    return {name: spread(values) for name, values in times.items()}


def timed(function: Callable[[], object], repeats: int) -> float:
    """Seconds of processor time per call: another job's turns do not count."""
    began_s = time.thread_time()
    for _ in range(repeats):
        function()
    return (time.thread_time() - began_s) / repeats


def own_disk() -> str | None:
    """Where several devices keep their outboxes: not all on one disk, which none of them shares."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() else None


class Ends:
    """A broker, the cloud and its devices, in processes of their own."""

    def __init__(self, folder: Path, *, devices: int, task: str, **settings: Any) -> None:
        port = free_port()
        fleet, gateway = folder / "fleet", folder / "gateway"
        create_fleet(fleet)
        add_gateway(fleet, gateway, "gw0")
        self._shelf = tempfile.TemporaryDirectory(dir=own_disk() if devices > 1 else None)
        folders = [Path(self._shelf.name) / f"device{number}" for number in range(devices)]
        for one in folders:
            add_device(fleet, one, [gateway])
        told = folder / "told.json"
        body = {
            "url": f"mqtt://127.0.0.1:{port}",
            "gateway": str(gateway),
            "devices": [str(one) for one in folders],
            "places": 4 * STREAMS,
            "task": task,
            **settings,
        }
        told.write_text(json.dumps(body), encoding="utf-8")
        self.broker = mosquitto(folder, port)
        self.broker.start()
        wait_listening(port)
        worker = str(HERE / "worker_stream.py")
        self._log = (folder / "cloud.log").open("wb")
        self.cloud = start(python(worker, "cloud", str(told)), stdout=self._log, stderr=self._log)
        self.reader = start(python(worker, "reader", str(told)), stdout=subprocess.PIPE)

    def says(self) -> Iterator[dict[str, Any]]:
        """What the reader tells, to its result."""
        assert self.reader.stdout is not None
        for line in self.reader.stdout:
            yield json.loads(line)

    def processes(self) -> dict[str, psutil.Process]:
        pids = {"broker": self.broker.pid, "gateway": self.cloud.pid, "devices": self.reader.pid}
        return {name: psutil.Process(pid) for name, pid in pids.items()}

    def close(self) -> None:
        for one in (self.reader, self.cloud):
            one.kill()
            one.wait(timeout=10)
        if self.reader.stdout is not None:
            self.reader.stdout.close()
        self.broker.kill()
        self._log.close()
        self._shelf.cleanup()


@contextmanager
def ends(**settings: Any) -> Iterator[Ends]:
    """Both ends, ready, while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        pair = Ends(Path(folder), **settings)
        try:
            assert next(pair.says()) == {"ready": True}
            yield pair
        finally:
            pair.close()


def result_of(pair: Ends) -> Any:
    for said in pair.says():
        if "result" in said:
            return said["result"]
    raise SystemExit("the reader ended without a result")


def latency(tick_s: float, rounds: int, chunks: int) -> dict[str, object]:
    """Milliseconds from due to read, over the link and plain by turns."""
    with ends(
        devices=1, task="latency", tick_s=tick_s, rate=RATE, chunks=chunks, rounds=rounds
    ) as pair:
        lags = result_of(pair)
    found = {way: spread([1000 * lag for lag in values]) for way, values in lags.items()}
    return {**found, "added_p50": found["link"]["p50"] - found["plain"]["p50"]}


def streams(seconds: float) -> dict[str, object]:
    """Lag, loss and processor shares of many streams."""
    chunks = int(seconds * RATE)
    with ends(
        devices=DEVICES, task="streams", tick_s=0.04, rate=RATE, chunks=chunks, streams=STREAMS
    ) as pair:
        processes = pair.processes()
        before = {name: busy_s(process) for name, process in processes.items()}
        began_s = time.monotonic()
        lags = result_of(pair)
        took_s = time.monotonic() - began_s
        shares = {name: (busy_s(one) - before[name]) / took_s for name, one in processes.items()}
    late = [1000 * lag for one in lags for lag in one]
    second_half = [1000 * lag for one in lags for lag in one[len(one) // 2 :]]
    return {
        "streams": STREAMS,
        "chunks_per_s": RATE,
        "seconds": seconds,
        "took_s": took_s,
        "lag_ms": spread(late),
        "lag_ms_second_half": spread(second_half),
        "lost": STREAMS * chunks - len(late),
        "cores": shares,
    }


def busy_s(process: psutil.Process) -> float:
    """Processor seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def memory(requests: int) -> dict[str, object]:
    """Resident MiB of both ends at every twentieth of the traffic."""
    samples: list[dict[str, float]] = []
    with ends(
        devices=1,
        task="traffic",
        tick_s=0.04,
        rate=0.0,
        chunks=HOUR_CHUNKS,
        requests=requests,
        together=8,
    ) as pair:
        processes = pair.processes()
        began_s = time.monotonic()
        for said in pair.says():
            if "result" in said:
                missing = said["result"]
                break
            if said["done"] % max(1, requests // 20) == 0:
                rss = {name: one.memory_info().rss / 2**20 for name, one in processes.items()}
                samples.append({"done": said["done"], **rss})
        took_s = time.monotonic() - began_s
    settled = samples[int(SETTLED * len(samples))]
    return {
        "requests": requests,
        "chunks": requests * HOUR_CHUNKS,
        "took_s": took_s,
        "missing": missing,
        "rss_mib": samples,
        "growth": {name: samples[-1][name] / settled[name] for name in ("gateway", "devices")},
    }


def verdict(found: dict[str, Any]) -> list[Bar]:
    """Against the bars of the issue, those that were measured."""
    bars: list[Bar] = []

    def bar(what: str, limit: float, value: float, unit: str) -> None:
        bars.append(Bar(what=what, bar=limit, kind="at most", value=value, unit=unit))

    if "envelope" in found:
        costs = found["envelope"]
        bar("seal and open a request of 1 kB", REQUEST_MS, 1e3 * costs["request"]["p50"], " ms")
        bar("seal and open a chunk", CHUNK_US, 1e6 * costs["chunk"]["p50"], " us")
    if "latency" in found:
        way = found["latency"]
        bar(
            "a chunk over the link beside the bare transport, p50",
            ADDED_MS,
            way["added_p50"],
            " ms",
        )
        bar("a chunk over the link and the broker, p50", ADDED_MS, way["link"]["p50"], " ms")
    if "streams" in found:
        many = found["streams"]
        # The streams begin within a second of one another.
        slower = many["took_s"] / (many["seconds"] + 1)
        bar(f"{STREAMS} streams: time taken over time planned", SUSTAINED, slower, "x")
        bar(f"chunks lost by {STREAMS} streams", 0, many["lost"], "")
    if "memory" in found:
        for name, growth in found["memory"]["growth"].items():
            bar(f"RSS of the {name} over an hour", RSS_GROWTH, growth, "x")
    return bars


def main() -> int:
    """Measure and print; keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parts = ("envelope", "latency", "streams", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seconds", type=float, default=30.0, help="of the streams")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for part in args.parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        match part:
            case "envelope":
                found[part] = envelope(20 if args.quick else 200)
            case "latency":
                rounds, chunks = (1, 40) if args.quick else (6, 200)
                found[part] = latency(0.0, rounds, chunks)
                found["latency_with_tick"] = latency(0.04, rounds, chunks)
            case "streams":
                found[part] = streams(5.0 if args.quick else args.seconds)
            case "memory":
                found[part] = memory(60 if args.quick else HOUR_REQUESTS)
        print(json.dumps(found[part])[:1500], file=sys.stderr, flush=True)
    bars = verdict(found)
    found["bars"] = [{**asdict(one), "verdict": one.verdict} for one in bars]
    text = report("link/cost.py", ("cryptography", "paho-mqtt"), found)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else "\n".join(one.line for one in bars))
    return 0


if __name__ == "__main__":
    sys.exit(main())
