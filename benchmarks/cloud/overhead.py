"""What HTTP and scheduling cost per token: streams through the whole service on a null executor.

An executor that returns at once leaves everybody else's time: planning, sampling, text, events,
JSON, server-sent events, h11, the event loop, the sockets. Turns alternate, each in processes of
its own: the service with a client beside it (two processes, as in life), once for raw completions
and once for chats, and the same engine read in its own process. Times are of the wall and of the
server's processors; the client keeps bytes and looks at nothing until all have ended.

    python benchmarks/cloud/overhead.py --repeats 5 --keep benchmarks/results/cloud-overhead.json \
        --profile benchmarks/results/cloud-overhead-profile.txt
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pstats
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from cloud.processes import HERE, ServiceProcess, run  # noqa: E402
from peers.bars import Bar  # noqa: E402
from peers.daemon import completion, stream_together  # noqa: E402
from report import report  # noqa: E402

SERVICE = str(HERE / "null_service.py")
PATHS = {"completions": "/v1/completions", "chats": "/v1/chat/completions"}
MOST_MS = 0.5
LEAST_TOKENS_PER_S = 2500
PROFILE_LINES = 32


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one token of one stream, in milliseconds; `events` are pieces of text that came."""

    wall_ms: float
    cpu_ms: float
    tokens: int
    events: int | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together."""
        return 1000 / self.wall_ms


def through_http(way: str, streams: int, tokens: int, extra: Sequence[str] = ()) -> Cost:
    """All streams at once, read to their ends."""
    arguments = [SERVICE, "serve", "--streams", str(streams), *extra]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with ServiceProcess(arguments, log) as service:
            asked = [_asked(way, number, tokens) for number in range(streams)]
            stream_together(service.port, asked[:2], path=PATHS[way])  # imports and first times
            cpu_s, began_s = service.cpu_s(), time.perf_counter()
            answers = stream_together(service.port, asked, path=PATHS[way])
            wall_s, cpu_s = time.perf_counter() - began_s, service.cpu_s() - cpu_s
    made = sum(one.tokens for one in answers)
    return Cost(
        wall_ms=1000 * wall_s / made,
        cpu_ms=1000 * cpu_s / made,
        tokens=made,
        events=sum(len(one.texts_s) for one in answers),
    )


def _asked(way: str, number: int, tokens: int) -> dict[str, object]:
    if way == "completions":
        return dict(completion(range(300 + number, 332 + number), tokens))
    said = [{"role": "user", "content": f"say {number} words"}]
    asked = completion((), tokens)
    return {**{key: value for key, value in asked.items() if key != "prompt"}, "messages": said}


def bare(streams: int, tokens: int) -> Cost:
    """The same streams without HTTP."""
    sizes = ("--streams", str(streams), "--tokens", str(tokens))
    found = json.loads(run(SERVICE, "engine", *sizes))
    made = found["tokens"]
    return Cost(
        wall_ms=1000 * found["wall_s"] / made, cpu_ms=1000 * found["cpu_s"] / made, tokens=made
    )


def profiled(streams: int, tokens: int) -> str:
    """Where the service's event loop spends its time, by cProfile, which slows it down."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "profile"
        through_http("chats", streams, tokens, ("--profile", str(found)))
        out = io.StringIO()
        with redirect_stdout(out):
            stats = pstats.Stats(str(found), stream=out).strip_dirs()
            stats.sort_stats("tottime").print_stats(PROFILE_LINES)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    kept = [line for line in lines if line and not re.search(r"/tmp|profile|Ordered", line)]
    return "\n".join(["The event loop of the null service, 32 streamed chats (cProfile).", *kept])


def bars(costs: dict[str, list[Cost]]) -> list[Bar]:
    """Medians of the turns."""
    found = []
    for way in PATHS:
        wall_ms = statistics.median(one.wall_ms for one in costs[way])
        rate = statistics.median(one.tokens_per_s for one in costs[way])
        found += [
            Bar(
                what=f"{way}: HTTP + scheduling per token per stream",
                bar=MOST_MS,
                kind="at most",
                value=wall_ms,
                unit=" ms",
            ),
            Bar(
                what=f"{way}: streamed tokens/s",
                bar=LEAST_TOKENS_PER_S,
                kind="at least",
                value=rate,
                unit="",
            ),
        ]
    return found


def main() -> int:
    """Measure and print; keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="of each stream")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    parser.add_argument("--profile", type=Path, help="text file to write a profile to")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    costs: dict[str, list[Cost]] = {"completions": [], "chats": [], "engine alone": []}
    for _ in range(args.repeats):
        for way in PATHS:
            costs[way].append(through_http(way, args.streams, args.tokens))
        costs["engine alone"].append(bare(args.streams, args.tokens))
    judged = bars(costs)
    body = {
        "streams": args.streams,
        "tokens_per_stream": args.tokens,
        "load_before": round(load, 2),
        "turns": {way: [asdict(one) for one in turns] for way, turns in costs.items()},
        "bars": [{**asdict(one), "verdict": one.verdict} for one in judged],
    }
    text = report("cloud/overhead.py", ("h11", "numpy", "starlette", "uvicorn"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.profile is not None:
        args.profile.write_text(profiled(args.streams, args.tokens) + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return 0
    print(f"{'':<14} {'ms/token':>9} {'cpu ms/token':>13} {'tokens/s':>9}")
    for way, turns in costs.items():
        wall_ms, cpu_ms, rate = (
            statistics.median(pick) for pick in zip(*(_figures(one) for one in turns), strict=True)
        )
        print(f"{way:<14} {wall_ms:>9.3f} {cpu_ms:>13.3f} {rate:>9.0f}")
    print("\n".join(one.line for one in judged))
    return 0


def _figures(cost: Cost) -> tuple[float, float, float]:
    return cost.wall_ms, cost.cpu_ms, cost.tokens_per_s


if __name__ == "__main__":
    sys.exit(main())
