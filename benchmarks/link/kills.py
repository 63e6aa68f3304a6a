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
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from link.children import ROLES, import_paths  # noqa: E402

sys.path[1:1] = import_paths()

from chaosplan import Faults  # noqa: E402
from link.killing import Outcome, run_way, schedule  # noqa: E402
from link.settings import TIMINGS, WAYS, Settings, Way  # noqa: E402
from report import report  # noqa: E402


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
        delay=args.delay,
        partition=args.partition,
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
    parser.add_argument("--delay", type=float, default=0.0, help="by up to 50 ms")
    parser.add_argument("--partition", type=float, default=0.0, help="of one second")
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
