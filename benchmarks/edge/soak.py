"""Ten thousand mixed requests to the daemon: every one ends once, and memory stays what it was.

The demo's edge model behind `tidegate serve`, 32 clients at once: streams and whole answers, greedy
and sampled, long prompts, token ids, clients that leave at once or in the middle, bad requests of
thirteen kinds, and structured output, logprobs and several choices where the service has them
(what it lacks is named). Greedy answers are compared with those of the same chats asked alone
before. Memory is compared from a tenth of the requests on. Ends after `--minutes` in any case and
says how far it came.

    python benchmarks/edge/soak.py --keep benchmarks/results/soak.json
    python benchmarks/edge/soak.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from peers.bars import Bar  # noqa: E402
from peers.daemon import Daemon  # noqa: E402
from peers.mix import CHAT, PROBES, WEIGHTS, Asked, Kind, ask, known_options  # noqa: E402
from peers.ours import prepare_bundle  # noqa: E402
from peers.rounds import tell  # noqa: E402
from report import report  # noqa: E402

CHATS, CLIENTS, RSS_EVERY = 40, 32, 100
RSS_GROWTH = 1.05
MOST_NOTES = 20
FLAGS = ("--rows", "8", "--context", "512", "--queue", "64", "--threads", "2")


@dataclass(kw_only=True)
class Record:
    """What was seen so far."""

    ended: Counter[str] = field(default_factory=Counter)
    """By kind and end."""
    wrong: list[str] = field(default_factory=list)
    """Requests that did not end exactly once, or not as they had to."""
    different: list[str] = field(default_factory=list)
    """Greedy answers that were not what they are alone."""
    compared: int = 0
    retries: int = 0
    rss_mib: list[float] = field(default_factory=list)
    """After every hundred requests."""


def chats() -> list[object]:
    """Of the assistant's test split, as OpenAI's messages."""
    from assistant.corpus import generate

    return [list(one.messages) for one in generate("test", count=CHATS)]


async def answer(client: httpx.AsyncClient, asked: Asked, record: Record) -> str | None:
    """Ask until it is not too busy; the text of the first choice, None without one."""
    while True:
        content = asked.body if isinstance(asked.body, bytes) else json.dumps(asked.body).encode()
        headers = {"content-type": "application/json"}
        request = client.build_request("POST", asked.path, content=content, headers=headers)
        response = await client.send(request, stream=True)
        try:
            if response.status_code == 429:
                record.retries += 1
            elif asked.leave_after is not None and response.status_code == 200:
                return await leave(response, asked, record)
            else:
                body = await response.aread()
                return judge(asked, response.status_code, body, record)
        finally:
            await response.aclose()
        await asyncio.sleep(0.05)


async def leave(response: httpx.Response, asked: Asked, record: Record) -> None:
    """Read a little and go away."""
    assert asked.leave_after is not None
    pieces = 0
    async for _ in response.aiter_bytes():
        pieces += 1
        if pieces > asked.leave_after:
            break
    record.ended[f"{asked.kind}: left"] += 1


def judge(asked: Asked, status: int, body: bytes, record: Record) -> str | None:
    """Whether the request ended exactly once, and as it had to."""
    problem, text = None, None
    if asked.choices == 0 or status != 200:
        refused = 400 <= status < 500 and b'"error"' in body
        if not refused or asked.choices != 0:
            problem = f"status {status}: {body[:200]!r}"
        record.ended[f"{asked.kind}: refused"] += 1
    elif asked.stream:
        problem, text = judge_stream(asked, body)
        record.ended[f"{asked.kind}: streamed"] += 1
    else:
        found = json.loads(body)["choices"]
        reasons = [one["finish_reason"] for one in found]
        if len(reasons) != asked.choices or not all(reasons):
            problem = f"finish reasons {reasons}"
        text = found[0]["message"]["content"] if asked.path == CHAT else found[0]["text"]
        record.ended[f"{asked.kind}: answered"] += 1
    if problem is not None:
        record.wrong.append(f"{asked.kind}: {problem}")
    return text


def judge_stream(asked: Asked, body: bytes) -> tuple[str | None, str]:
    """What is wrong with a stream's end, and the text of its first choice."""
    events = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    text, reasons = "", Counter[int]()
    for event in events[:-1]:
        for choice in json.loads(event).get("choices", []):
            if choice["finish_reason"] is not None:
                reasons[choice["index"]] += 1
            elif reasons[choice["index"]]:
                return f"choice {choice['index']} went on after its end", text
            if choice["index"] == 0:
                text += choice["delta"].get("content") or ""
    if not events or events[-1] != "[DONE]":
        return f"the stream ends with {events[-1:]}", text
    if reasons != Counter(range(asked.choices)):
        return f"ends per choice: {dict(reasons)}", text
    return None, text


async def one_client(
    client: httpx.AsyncClient,
    work: Iterator[tuple[int, Asked]],
    alone: list[str | None],
    seen: Record,
) -> None:
    """Take requests until there are none."""
    for number, asked in work:
        try:
            text = await answer(client, asked, seen)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            seen.wrong.append(f"{asked.kind}: {type(error).__name__}: {error}")
            continue
        if asked.known is not None:
            seen.compared += 1
            if text != alone[asked.known]:
                expected = alone[asked.known]
                seen.different.append(f"request {number}: {text!r} instead of {expected!r}")


async def lacking(client: httpx.AsyncClient, chat: object) -> list[Kind]:
    """Kinds that the service refuses to know."""
    found: list[Kind] = []
    for kind, fields in PROBES.items():
        body = {"messages": chat, "max_tokens": 8, **fields}
        if (await client.post(CHAT, json=body)).status_code != 200:
            found.append(kind)
    return found


async def soak(daemon: Daemon, requests: int, minutes: float) -> dict[str, Any]:
    """Everything, against a running daemon."""
    record, known = Record(), chats()
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    url = f"http://127.0.0.1:{daemon.port}"
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        without = await lacking(client, known[0])
        alone: list[str | None] = []
        for chat in known:
            body = {"messages": chat, **known_options()}
            alone.append(await answer(client, Asked(kind="known", path=CHAT, body=body), record))
        record.ended.clear()
        began_s = time.perf_counter()

        def work() -> Iterator[tuple[int, Asked]]:
            for number in range(requests):
                if time.perf_counter() - began_s > 60 * minutes:
                    return
                if number % RSS_EVERY == 0:
                    record.rss_mib.append(daemon.rss_mib())
                    if number % (10 * RSS_EVERY) == 0:
                        tell(f"{number} of {requests}, {record.rss_mib[-1]:.0f} MiB")
                yield number, ask(number, known, without)

        shared = work()
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(one_client(client, shared, alone, record))
        seconds = time.perf_counter() - began_s
        engine = await settled(client)
    record.rss_mib.append(daemon.rss_mib())
    return {"without": without, "seconds": seconds, "engine": engine, **vars(record)}


async def settled(client: httpx.AsyncClient) -> Mapping[str, Any]:
    """The engine's numbers once nobody is left, or after ten seconds as they are."""
    for _ in range(100):
        engine = (await client.get("/status")).json()["engine"]
        if engine["running"] == engine["waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    assert isinstance(engine, dict)
    return engine


def verdict(found: Mapping[str, Any], requests: int) -> list[Bar]:
    """Each claim as a bar."""
    ended = sum(found["ended"].values())
    rss = found["rss_mib"][len(found["rss_mib"]) // 10 :]
    left = found["engine"]["running"] + found["engine"]["waiting"] + found["engine"]["failed"]
    at_most = [
        ("requests that did not end exactly once as they had to", len(found["wrong"]), 0),
        ("requests that the engine still holds, or failed", left, 0),
        ("greedy answers other than alone", len(found["different"]), 0),
        ("resident memory, most / after a tenth", max(rss) / rss[0], RSS_GROWTH),
    ]
    bars = [Bar(what="requests that ended", bar=requests, kind="at least", value=ended, unit="")]
    bars += [Bar(what=a, bar=b, kind="at most", value=v, unit="") for a, v, b in at_most]
    return bars


def main() -> int:
    """Convert, serve, soak, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=15.0, help="end after so many")
    parser.add_argument("--executor", choices=("openvino", "onnx"), default="openvino")
    parser.add_argument("--native", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--work", type=Path, default=ROOT / ".tidegate" / "bench")
    parser.add_argument("--quick", action="store_true", help="60 requests")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.requests = 60
    work = args.work / "assistant"
    work.mkdir(parents=True, exist_ok=True)
    bundle = prepare_bundle(ROOT / "examples/assistant/edge", work)
    flags = ["--executor", args.executor, "--native", args.native, *FLAGS]
    with Daemon(bundle, flags, work / "soak.log") as daemon:
        found = asyncio.run(soak(daemon, args.requests, args.minutes))
    bars = verdict(found, args.requests)
    found |= {one: found[one][:MOST_NOTES] for one in ("wrong", "different")}
    body = {
        "requests": args.requests,
        "executor": args.executor,
        "weights": WEIGHTS,
        **found,
        "bars": [{**asdict(one), "verdict": one.verdict} for one in bars],
    }
    text = report("edge/soak.py", ("numpy", "onnxruntime", "openvino", "uvicorn", "httpx"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return 0
    print(f"{args.executor}: {found['seconds']:.0f} s; the service lacks {found['without']}")
    print("\n".join(f"{count:>6} {what}" for what, count in sorted(found["ended"].items())))
    print("\n".join([*found["wrong"], *found["different"]]))
    print("\n".join(one.line for one in bars))
    return 0


if __name__ == "__main__":
    sys.exit(main())
