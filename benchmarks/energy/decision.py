"""How long the daemon takes to decide with 64 requests in line: measured in its own process.

A real `tidegate serve` holds so many background calls in quiet hours, and answers short ones beside
them; each arrival and each end is a decision about all of them. Its `/status` tells what the last
thousand took: PACE alone, and all of it with the state before and what is done after; by the clock,
and of the processor's own time, which other programs on the machine do not lengthen.

    python benchmarks/energy/decision.py BUNDLE --keep benchmarks/results/energy-decision.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from report import report  # noqa: E402


def body(words: str, tokens: int, priority: str) -> dict[str, object]:
    """A greedy chat on the device that no cache knows; every other one has a deadline."""
    options: dict[str, object] = {"priority": priority, "route": "edge", "cache": False}
    if words.endswith(("1", "3", "5", "7", "9")):
        options["deadline_ms"] = 8 * 3600 * 1000
    said = [{"role": "user", "content": words}]
    return {"messages": said, "max_tokens": tokens, "temperature": 0, "tidegate": options}


async def asked(client: httpx.AsyncClient, url: str, call: dict[str, object]) -> None:
    """A caller that stays until it is answered or cancelled."""
    response = await client.post(f"{url}/v1/chat/completions", json=call, timeout=None)
    response.raise_for_status()


async def measure(url: str, waiting: int, rounds: int) -> dict[str, Any]:
    """What `/status` says after `rounds` short calls beside `waiting` held ones."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits) as client:
        tasks = [
            asyncio.create_task(asked(client, url, body(f"later {number}", 8, "background")))
            for number in range(waiting)
        ]
        energy: dict[str, Any] = {}
        while energy.get("held") != waiting:
            await asyncio.sleep(0.2)
            energy = (await client.get(f"{url}/status")).json()["energy"]
        for number in range(rounds):
            await asked(client, url, body(f"now {number}", 4, "interactive"))
        energy = (await client.get(f"{url}/status")).json()["energy"]
        assert energy["held"] == waiting, "quiet hours hold them all along"
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    return energy


def main() -> int:
    """Start the daemon, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=700)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    now = datetime.now()
    quiet = f"{now - timedelta(hours=1):%H:%M}-{now + timedelta(hours=3):%H:%M}"
    command = [
        *(sys.executable, "-P", "-m", "tidegate.cli", "serve", str(args.bundle)),
        *("--listen", "127.0.0.1:0", "--queue", str(2 * args.waiting), "--threads", "1"),
        *("--profile", "generic-x86-64", "--power-switching", "off", "--quiet-hours", quiet),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as daemon:
        try:
            assert daemon.stdout is not None
            url = daemon.stdout.readline().split()[-1]
            energy = asyncio.run(measure(url, args.waiting, args.rounds))
        finally:
            daemon.terminate()
    result = {
        "waiting": args.waiting,
        "decisions": energy["decisions"],
        "of the last": min(1024, energy["decisions"]),
        "load of the machine": os.getloadavg()[0],
        "us": energy["decision_us"],
    }
    text = report("energy/decision.py", ("numpy",), result)
    print(text)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
