"""How long an answer stands still when its path breaks under it: broker, then HTTP, then back.

A device streams from a gateway through mosquitto, with the default times. Mosquitto is killed in
mid-stream and started again some seconds later. For every round: the longest silence after the
kill (patience 5 s, then the first payload over HTTP), the longest one after the broker is back, and
which path was used when. Every payload must come once and in order. Beside it, per path, the median
time of a short request and its answer, turn by turn.

    python benchmarks/link/paths.py --keep benchmarks/results/link-paths.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from link.children import Child, free_port, import_paths, mosquitto, wait_listening  # noqa: E402

sys.path[1:1] = import_paths()

from linkhttp import OFFER, http_of, http_side, running, until  # noqa: E402
from report import report  # noqa: E402

from tidegate.cloud.link_http import LinkHttpTiming  # noqa: E402
from tidegate.link.device import DeviceLink  # noqa: E402
from tidegate.link.device_paths import DevicePaths  # noqa: E402
from tidegate.link.effects import InboundRequest  # noqa: E402
from tidegate.link.fleet import pair  # noqa: E402
from tidegate.link.gateway import Gateway  # noqa: E402
from tidegate.link.gateway_paths import GatewayPaths  # noqa: E402
from tidegate.link.mqtt import MqttTransport  # noqa: E402

PACE_S = 0.02
KILL_AT, START_AFTER_S = 50, 8.0
PAYLOADS = 1500
"""Thirty seconds: the broker is away for eight, then must stand for five."""


async def counting(request: InboundRequest) -> AsyncIterator[bytes]:
    """As many numbers as the body says."""
    for number in range(int(request.body)):
        yield b"%d" % number
        await asyncio.sleep(PACE_S)


async def short_s(link: DeviceLink) -> float:
    began_s = time.perf_counter()
    async for _ in link.request(b"1", deadline_s=30):
        pass
    return time.perf_counter() - began_s


async def one_round(link: DeviceLink, broker: Child) -> dict[str, float]:
    """One answer with a broker that dies and returns under it."""
    seen: list[int] = []
    at_s: list[float] = []
    killed_s = started_s = 0.0
    async for payload in link.request(b"%d" % PAYLOADS, deadline_s=120):
        seen.append(int(payload))
        at_s.append(time.perf_counter())
        if len(seen) == KILL_AT:
            broker.kill()
            killed_s = time.perf_counter()
        if killed_s and not started_s and at_s[-1] > killed_s + START_AFTER_S:
            assert link.path == "http"
            broker.start()
            started_s = time.perf_counter()
    assert seen == list(range(PAYLOADS)), "every payload once, in order"
    await until(lambda: link.path == "mqtt", "the broker is used again", within_s=30)
    gaps = [(late, late - early) for early, late in pairwise(at_s)]
    return {
        "silent_after_the_kill_s": round(max(gap for end, gap in gaps if end <= started_s), 3),
        "silent_after_the_return_s": round(max(gap for end, gap in gaps if end > started_s), 3),
    }


async def measure(folder: Path, rounds: int) -> dict[str, object]:
    pair(folder / "device", folder / "gateway")
    port = free_port()
    broker = mosquitto(folder, port)
    broker.start()
    wait_listening(port)
    url = f"mqtt://127.0.0.1:{port}"
    keys = folder / "device"
    try:
        async with AsyncExitStack() as stack:
            side = await stack.enter_async_context(
                http_side(folder / "gateway", timing=LinkHttpTiming())
            )
            ways = GatewayPaths(MqttTransport(url), side.hub)
            gateway = Gateway(folder / "gateway", ways, counting, models=lambda: (OFFER,))
            stack.push_async_callback(gateway.close)
            await stack.enter_async_context(running(gateway.run))
            short: dict[str, list[float]] = {"mqtt": [], "http": []}
            for kind in ("mqtt", "http") * 3:
                way = MqttTransport(url) if kind == "mqtt" else http_of(side.url, keys)
                link = DeviceLink(keys, way)
                async with running(link.run):
                    await short_s(link)
                    short[kind] += [await short_s(link) for _ in range(10)]
                await link.close()
            link = DeviceLink(keys, DevicePaths(MqttTransport(url), http_of(side.url, keys)))
            stack.push_async_callback(link.close)
            await stack.enter_async_context(running(link.run))
            await until(lambda: link.connected, "the device is connected")
            found = [await one_round(link, broker) for _ in range(rounds)]
    finally:
        broker.kill()
    medians = {kind: round(1000 * statistics.median(times), 1) for kind, times in short.items()}
    return {"rounds": found, "short_request_ms": medians, "payloads_per_round": PAYLOADS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="file to write the results to, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = asyncio.run(measure(Path(name), args.rounds))
    text = report("link/paths.py", ("cryptography", "httpx", "paho-mqtt", "uvicorn"), results)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
