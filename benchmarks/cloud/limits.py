"""Are limits what they say: eight clients at once, every strategy, in memory and on one Redis.

Real `tidegate cloud` processes on a tiny random model: one that counts in its memory, and two
replicas that count in one real `redis-server`. Eight clients ask as fast as they can for some
windows; what was granted is held against what the limit allows in that time, within 2 %, and never
more than it allows: by stretches for sliding windows, by windows of the clock for fixed ones, by
level and inflow for buckets. A month's quota of 100 requests has to be spent to the last one and
not beyond, whichever replica is asked. Clients that other work on the machine kept from asking
prove nothing: such a turn is made again, and told.

    python benchmarks/cloud/limits.py --keep benchmarks/results/cloud-limits.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

from cloud.processes import TIDEGATE, ServiceProcess, run  # noqa: E402
from peers.rounds import tell  # noqa: E402
from report import report  # noqa: E402
from wordmodel import write_word_checkpoint  # noqa: E402

CLIENTS = 8
TOLERANCE = 0.02
WINDOW_S, WINDOWS, CALLS = 3, 4, 60
"""`CALLS` fit into a window, whether they are counted or their tokens are."""
LASTS_S = (WINDOWS - 1 + 0.6) * WINDOW_S
"""As many windows, the last long enough to be used up by clients that were held up before."""
MOST_TURNS, MOST_GAP_S = 5, 0.3
CHAT = "/v1/chat/completions"
QUOTA = 100
BODY = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 1,
    "ignore_eos": True,
    "temperature": 0,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was granted under one limit, in calls."""

    store: str
    limit: str
    expected: float
    granted: int
    refused: int
    overspent: int
    """Calls beyond what the limit can have allowed, whatever the clients' luck was."""
    longest_gap_s: float
    """Between two answers of any kind."""
    turns: int = 1
    """Made until the clients could ask enough."""

    @property
    def starved(self) -> bool:
        """The clients could not ask for as much as there was."""
        return self.longest_gap_s > MOST_GAP_S or self.refused < self.expected / 2

    @property
    def verdict(self) -> str:
        """What is too much counts in any turn."""
        if self.overspent:
            return "MISSED"
        return "starved" if self.starved else "met" if self.met else "MISSED"

    @property
    def off(self) -> float:
        """The share by which it was too much (or, negative, too little)."""
        return self.granted / self.expected - 1

    @property
    def met(self) -> bool:
        """Within 2 %, and nothing was spent twice."""
        return abs(self.off) <= TOLERANCE and self.overspent == 0


@dataclass(frozen=True, kw_only=True)
class Granted:
    """When calls were asked and answered, in the order of their answers; and how many were not."""

    asked_s: list[float]
    answered_s: list[float]
    refused: int
    ended_s: float
    longest_gap_s: float


def hammer(ports: Sequence[int], key: str, lasts_s: float, *, aligned: bool = False) -> Granted:
    """Eight clients, each on one connection to one replica; `aligned`: from a window's begin."""
    calls: list[tuple[float, float]] = []
    others: Counter[int] = Counter()
    answers_s: list[float] = []
    times: list[float] = []

    def begin() -> None:
        if aligned:
            time.sleep(WINDOW_S - time.time() % WINDOW_S)
        times.append(time.time() + lasts_s)

    together = threading.Barrier(CLIENTS, action=begin)

    def client(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        together.wait()
        while time.time() < times[0]:
            asked_s, (status, _) = time.time(), ask(connection, key)
            answers_s.append(time.time())
            if status == 200:
                calls.append((time.time(), asked_s))
            else:
                others[status] += 1
                time.sleep(0.02)
        connection.close()

    threads = [
        threading.Thread(target=client, args=(ports[number % len(ports)],))
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(others) <= {429}, others
    calls.sort()
    return Granted(
        asked_s=[asked_s for _, asked_s in calls],
        answered_s=[answered_s for answered_s, _ in calls],
        refused=others[429],
        ended_s=times[0],
        longest_gap_s=max(b - a for a, b in pairwise(sorted(answers_s))),
    )


def ask(connection: http.client.HTTPConnection, key: str) -> tuple[int, Any]:
    """One call on a kept connection."""
    heads = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps(BODY), heads)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def new_key(state: Path, name: str, *flags: str) -> str:
    """A key with limits."""
    made = run(*TIDEGATE, "keys", "api", "add", str(state), name, "--json", *flags)
    return str(json.loads(made)["key"])


def measure(store: str, state: Path, ports: Sequence[int]) -> Iterator[Case]:
    """Every strategy by requests and by tokens, then a quota."""
    connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=60)
    status, first = ask(connection, new_key(state, "first"))
    assert status == 200, first
    connection.close()
    tokens = first["usage"]["total_tokens"]
    for unit, amount in (("requests", CALLS), ("tokens", CALLS * tokens)):
        for strategy in ("fixed", "sliding", "bucket"):
            rate = f"{amount}/{WINDOW_S}s/{strategy}"
            for turn in range(1, MOST_TURNS + 1):
                name = f"{unit}-{strategy}-{turn}"
                key = new_key(state, name, f"--{unit}", rate)
                found = hammer(ports, key, LASTS_S, aligned=strategy == "fixed")
                case = replace(judged(store, f"{unit} {rate}", strategy, found), turns=turn)
                if not case.starved or case.overspent:
                    break
            yield case
    yield quota(store, new_key(state, "quota", "--quota-requests-month", str(QUOTA)), ports)


def quota(store: str, key: str, ports: Sequence[int]) -> Case:
    """Asked for until it is spent, and on."""
    found = hammer(ports, key, 8.0)
    granted = len(found.answered_s)
    return Case(
        store=store,
        limit=f"quota of {QUOTA} requests",
        expected=QUOTA,
        granted=granted,
        refused=found.refused,
        overspent=max(0, granted - QUOTA),
        longest_gap_s=0.0,  # how fast it is spent is no matter
    )


def judged(store: str, limit: str, strategy: str, found: Granted) -> Case:
    """What came, against what the limit allows."""
    granted = len(found.answered_s)
    expected: float = WINDOWS * CALLS
    # Windows of the clock that were met; the last answer may be late enough for one more.
    met = int(found.answered_s[-1] // WINDOW_S) - int(min(found.asked_s) // WINDOW_S) + 1
    overspent = max(0, granted - met * CALLS)
    if strategy == "bucket":
        flows = CALLS / WINDOW_S
        expected = CALLS + flows * (found.ended_s - found.answered_s[0])
        # The bucket was full when the first was asked; from then until the last answer it filled.
        bound = CALLS + flows * (found.answered_s[-1] - min(found.asked_s))
        overspent = max(0, granted - int(bound) - 1)
    elif strategy == "sliding":
        # One more than fits: between its asking and the answer to the last lies a whole window.
        pairs = zip(sorted(found.asked_s), found.answered_s[CALLS:], strict=False)
        overspent = sum(later - first < WINDOW_S for first, later in pairs)
    return Case(
        store=store,
        limit=limit,
        expected=round(expected, 1),
        granted=granted,
        refused=found.refused,
        overspent=overspent,
        longest_gap_s=round(found.longest_gap_s, 3),
    )


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Debian's, on a port and folder of its own; gives its URL."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed (Debian package redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = ("--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", "")
    server = subprocess.Popen([program, *settings], stdout=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(20)


def services(stack: ExitStack, folder: Path, model: Path, redis: str | None) -> list[int]:
    """The ports of one service, or of two that share a Redis and the folder of keys."""
    flags = ["--state", str(folder / "state"), "--threads", "1", "--listen", "127.0.0.1:0"]
    if redis is not None:
        flags += ["--limits-redis", redis]
    folder.mkdir()
    command = [*TIDEGATE, "cloud", str(model), *flags]
    started = [ServiceProcess(command, folder / "log") for _ in range(1 if redis is None else 2)]
    return [stack.enter_context(one).port for one in started]


def main() -> int:
    """Measure, print, keep; 1 when a limit was not kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    load, cases = os.getloadavg()[0], list[Case]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_word_checkpoint(folder / "model", layers=1)
        for store in ("memory, one service", "Redis, two replicas"):
            with ExitStack() as stack:
                redis = stack.enter_context(redis_server(folder)) if "Redis" in store else None
                home = folder / store.partition(",")[0]
                ports = services(stack, home, model, redis)
                for case in measure(store, home / "state", ports):
                    tell(line(case))
                    cases.append(case)
    body = {
        "clients": CLIENTS,
        "tolerance": TOLERANCE,
        "load_before": round(load, 2),
        "cases": [
            {**asdict(one), "off": round(one.off, 4), "verdict": one.verdict} for one in cases
        ],
    }
    text = report("cloud/limits.py", ("limits", "redis", "uvicorn"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else "\n".join(line(case) for case in cases))
    return 0 if all(case.verdict == "met" for case in cases) else 1


def line(case: Case) -> str:
    """For people."""
    came = f"{case.granted:>4} of {case.expected:>6} {100 * case.off:>+6.2f} %"
    beside = f"overspent {case.overspent}, refused {case.refused}, turn {case.turns}"
    return f"{case.verdict:<7} {case.store:<20} {case.limit:<26} {came}  {beside}"


if __name__ == "__main__":
    sys.exit(main())
