"""What share of prompt tokens is found in a prefix cache, by how Ray Serve's replicas are chosen.

Three replicas of a small random model, each with room for 16 prompts. Thirty teams of users: all
prompts begin with the same sentence, then with their team's instructions, and end with a question
of their own. That is more than one replica keeps and no more than three keep together, beside what
runs. Questions come in a seeded random order, six at a time. The routers are ours, Ray's own (the
less loaded of two) and one that draws at random; each begins with empty caches, and they take
turns. Then ours by how many blocks of 16 tokens a prompt is known by. Shares do not depend on how
fast the machine is; times do.

    python benchmarks/cloud/ray_affinity.py --keep benchmarks/results/cloud-ray.json
    python benchmarks/cloud/ray_affinity.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/support")]

from ray import serve  # noqa: E402
from ray.serve.request_router import RequestRouter  # noqa: E402
from report import report  # noqa: E402
from wordmodel import write_word_checkpoint  # noqa: E402

from tidegate.api.schema import Call, read_chat  # noqa: E402
from tidegate.cloud.executor_choice import ExecutorSettings  # noqa: E402
from tidegate.cloud.ray.affinity import ANCHOR_BLOCKS  # noqa: E402
from tidegate.cloud.ray.application import cluster, engines  # noqa: E402
from tidegate.cloud.ray.backend import RayBackend  # noqa: E402
from tidegate.cloud.ray.handle import ServeReplicas  # noqa: E402
from tidegate.cloud.ray.loading import load_text  # noqa: E402
from tidegate.cloud.ray.router import PrefixRouter  # noqa: E402
from tidegate.cloud.ray.settings import RaySettings, ScaleSettings  # noqa: E402
from tidegate.engine.events import Finished, TextDelta  # noqa: E402

REPLICAS, ROWS, TEAMS, AT_ONCE, CONTEXT = 3, 16, 30, 6, 1024
WORDS = (ROOT / "examples/assistant/README.md").read_text(encoding="utf-8").split()
_NUMBERS = itertools.count()
ALL_BEGIN = "You answer in one short sentence and never guess. "


class RandomRouter(RequestRouter):
    """Any replica, whatever it has."""

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        """See `RequestRouter.choose_replicas`."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        drawn = list(candidate_replicas)
        random.shuffle(drawn)
        return [[one] for one in drawn]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One router's run."""

    router: str
    anchor_blocks: int
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    """The median."""
    total_s: float

    @property
    def hit_share(self) -> float:
        """Of prompt tokens, those that were not computed."""
        return self.cached_tokens / self.prompt_tokens


ROUTERS: dict[str, object] = {
    "prefix affinity": PrefixRouter,
    "power of two": None,
    "random": RandomRouter,
}


def calls(teams: int, asks: int, seed: int) -> list[Call]:
    """All questions, in the order in which they come."""
    draw = random.Random(seed)
    told = [" ".join(draw.choices(WORDS, k=70)) for _ in range(teams)]
    bodies = [
        {
            "messages": [
                {"role": "system", "content": ALL_BEGIN + told[team]},
                {"role": "user", "content": " ".join(draw.choices(WORDS, k=6))},
            ],
            "max_tokens": 8,
            "temperature": 0,
        }
        for team in range(teams)
        for _ in range(asks)
    ]
    draw.shuffle(bodies)
    return [read_chat(body) for body in bodies]


async def ask_all(backend: RayBackend, asked: Sequence[Call]) -> tuple[list[Finished], list[float]]:
    """Every call, so many at once; how each ended and when its first token came."""
    places, ends, firsts = asyncio.Semaphore(AT_ONCE), list[Finished](), list[float]()

    async def one(call: Call) -> None:
        async with places:
            began_s, first = time.monotonic(), True
            async with aclosing(backend.answer_as(call, random.randbytes(16).hex())) as events:
                async for event in events:
                    if isinstance(event, TextDelta) and first:
                        firsts.append(time.monotonic() - began_s)
                        first = False
                    if isinstance(event, Finished):
                        ends.append(event)

    async with asyncio.TaskGroup() as tasks:
        for call in asked:
            tasks.create_task(one(call))
    return ends, firsts


def measure(
    model: Path, router: str, asked: Sequence[Call], *, anchor_blocks: int = ANCHOR_BLOCKS
) -> Outcome:
    """Fresh replicas behind one router."""
    settings = RaySettings(
        model=model,
        model_id="words",
        executor=ExecutorSettings(choice="torch", rows=ROWS, threads=1, context_tokens=CONTEXT),
        scale=ScaleSettings(min_replicas=REPLICAS, max_replicas=REPLICAS, cpus=0.1),
    )

    async def main(handle: Any) -> Outcome:
        replicas = ServeReplicas(handle)
        facts = await replicas.facts()
        text = load_text(settings, facts.context_tokens)
        backend = RayBackend(replicas, text, facts, anchor_blocks=anchor_blocks)
        began_s = time.monotonic()
        ends, firsts = await ask_all(backend, asked)
        assert len(ends) == len(asked), "every call ends well"
        return Outcome(
            router=router,
            anchor_blocks=anchor_blocks,
            prompt_tokens=sum(end.usage.prompt_tokens for end in ends),
            cached_tokens=sum(end.usage.cached_tokens for end in ends),
            first_token_s=statistics.median(firsts),
            total_s=time.monotonic() - began_s,
        )

    made = engines(settings, router=ROUTERS[router])
    # A name of its own: a process keeps the router that it once had for a name.
    name = f"affinity-{next(_NUMBERS)}"
    handle = serve.run(made, name=name, route_prefix=None)
    try:
        return asyncio.run(main(handle))
    finally:
        serve.delete(name)


def line(name: str, found: Sequence[Outcome]) -> dict[str, object]:
    """Medians of one router's runs."""
    return {
        "router": name,
        "anchor_blocks": found[0].anchor_blocks,
        "hit_share": round(statistics.median(one.hit_share for one in found), 4),
        "first_token_ms": round(1000 * statistics.median(one.first_token_s for one in found), 1),
        "total_s": round(statistics.median(one.total_s for one in found), 2),
    }


def run(
    model: Path, rounds: int, asks: int, sweep: Sequence[int]
) -> tuple[dict[str, list[Outcome]], list[Outcome]]:
    """All routers in turns, then the sweep."""
    found: dict[str, list[Outcome]] = {name: [] for name in ROUTERS}
    swept: list[Outcome] = []
    with cluster(cpus=2):
        serve.start(http_options={"location": "NoServer"})
        for turn in range(rounds):
            names = list(ROUTERS)
            for name in names[turn % 3 :] + names[: turn % 3]:
                found[name].append(measure(model, name, calls(TEAMS, asks, seed=turn)))
                print(found[name][-1], file=sys.stderr)
        for blocks in sweep:
            asked = calls(TEAMS, asks, seed=0)
            swept.append(measure(model, "prefix affinity", asked, anchor_blocks=blocks))
            print(swept[-1], file=sys.stderr)
        serve.shutdown()
    return found, swept


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asks", type=int, default=12, help="of each team")
    parser.add_argument("--quick", action="store_true", help="one round, few questions, no sweep")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rounds, asks = (1, 3) if args.quick else (args.rounds, args.asks)
    sweep = () if args.quick else (1, 4, ANCHOR_BLOCKS, 16)
    with tempfile.TemporaryDirectory(prefix="tidegate-") as folder:
        found, swept = run(write_word_checkpoint(Path(folder)), rounds, asks, sweep)
    lines = [line(name, ones) for name, ones in found.items()]
    by_anchor = [line("prefix affinity", [one]) for one in swept]
    body = {
        "replicas": REPLICAS,
        "rows": ROWS,
        "teams": TEAMS,
        "asks": asks,
        "routers": lines,
        "by_anchor": by_anchor,
        "runs": [asdict(one) for ones in found.values() for one in ones],
    }
    text = report("cloud/ray_affinity.py", ("ray", "torch"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return 0
    for one in [*lines, *by_anchor]:
        print(
            f"{one['router']:<16} {one['anchor_blocks']:>3} blocks  hits {one['hit_share']:>7.1%}"
            f"  first token {one['first_token_ms']:>7.1f} ms  all {one['total_s']:>6.2f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
