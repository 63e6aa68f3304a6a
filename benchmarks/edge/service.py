"""What HTTP and scheduling cost: eight streams through the daemon beside the bare executor.

Turns alternate: the executor in a plain loop, the engine in the same kind of process without HTTP,
and the daemon with eight streaming clients, on one bundle with the same settings. The time per step
of each is compared within its round. Also from the daemon's turns: process start to the first token
of a 128-token prompt, files in the page cache, and resident memory beyond weights and KV.

    python benchmarks/edge/service.py --shape tinyllama-1.1b --repeats 5 \
        --keep benchmarks/results/service.json
    python benchmarks/edge/service.py --quick
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from converters.synthetic import SHAPES  # noqa: E402
from peers.bars import COLD_START_S, RSS_SLACK_MIB, Bar  # noqa: E402
from peers.contract import Figures, Prepared, Turn  # noqa: E402
from peers.daemon import CACHE, Daemon, Streamed, completion, step_s, stream_together  # noqa: E402
from peers.ours import Tidegate, checkpoint_of, native_problem  # noqa: E402
from peers.rounds import tell  # noqa: E402
from report import report  # noqa: E402

STREAMS = 8
OVERHEAD = 1.05
ROOM_TOKENS = 64
"""Of context beyond prompt and answer, rounded up to blocks, as the workers have it."""
BLOCK_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Served:
    """One turn of the daemon."""

    cold_start_s: float
    step_s: float
    rss_mib: float


@dataclass(frozen=True, kw_only=True)
class ServiceRound:
    """Seconds per step of eight streams, by way."""

    executor_step_s: float
    engine_step_s: float
    daemon: Served
    kv_bytes: int


def serve(prepared: Prepared, executor: str, turn: Turn) -> Served:
    """Start the daemon, answer once cold, then eight times at once."""
    rng = random.Random(turn.seed)
    longest = turn.prompt_tokens + turn.decode_tokens + ROOM_TOKENS
    context = -(-longest // BLOCK_TOKENS) * BLOCK_TOKENS
    sizes = {"rows": STREAMS, "context": context, "threads": turn.threads, "queue": 64}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    flags += ["--cache-dir", str(prepared.model.parent / CACHE)]
    log = prepared.model.parent / "serve.log"
    with Daemon(prepared.model, ["--executor", executor, *flags], log) as daemon:
        first = prompts(rng, turn, prepared.vocab, 1)
        (cold,) = ask(daemon, first, 2)
        together = prompts(rng, turn, prepared.vocab, STREAMS)
        # Read before, so that all eight start within a few steps of one another.
        ask(daemon, together, 1)
        streams = ask(daemon, together, turn.decode_tokens)
        return Served(
            cold_start_s=cold.texts_s[0] - daemon.began_s,
            step_s=step_s(streams),
            rss_mib=daemon.rss_mib(),
        )


def prompts(rng: random.Random, turn: Turn, vocab: int, count: int) -> list[list[int]]:
    """Random token ids; those of single bytes are left out, which may be no whole character."""
    low = min(300, vocab - 2)
    return [[rng.randrange(low, vocab) for _ in range(turn.prompt_tokens)] for _ in range(count)]


def ask(daemon: Daemon, together: Sequence[Sequence[int]], tokens: int) -> list[Streamed]:
    """All prompts at once; guessing ahead is off, which the bare executor does not do either."""
    bodies = [
        completion(one, tokens, tidegate={"route": "edge", "speculation": False})
        for one in together
    ]
    return stream_together(daemon.port, bodies)


def run_round(prepared: Prepared, executor: str, turn: Turn) -> ServiceRound:
    """Each way once."""
    ours = Tidegate(name=executor, choice=executor, native=None)  # type: ignore[arg-type]
    bare = ours.run(prepared, turn)
    engine = replace(ours, through="engine").run(prepared, turn)
    assert bare.kv_bytes is not None
    return ServiceRound(
        executor_step_s=_step_s(bare),
        engine_step_s=_step_s(engine),
        daemon=serve(prepared, executor, turn),
        kv_bytes=bare.kv_bytes,
    )


def _step_s(figures: Figures) -> float:
    return STREAMS / figures.decode_tokens_per_s[STREAMS]


def verdict(rounds: Sequence[ServiceRound], weight_bytes: int, shape: str) -> list[Bar]:
    """Medians of the rounds' ratios."""

    def bar(what: str, bar: float, values: Sequence[float], unit: str) -> Bar:
        value = statistics.median(values)
        return Bar(what=what, bar=bar, kind="at most", value=value, unit=unit)

    http = [one.daemon.step_s / one.executor_step_s for one in rounds]
    engine = [one.engine_step_s / one.executor_step_s for one in rounds]
    beyond = [one.daemon.rss_mib - (weight_bytes + one.kv_bytes) / 2**20 for one in rounds]
    found = [
        bar("step of 8 streams: engine / executor", OVERHEAD, engine, "x"),
        bar("step of 8 streams: HTTP / executor", OVERHEAD, http, "x"),
        bar("RSS of the daemon beyond weights and KV", RSS_SLACK_MIB, beyond, " MiB"),
    ]
    if shape == "tinyllama-1.1b":
        cold = [one.daemon.cold_start_s for one in rounds]
        found.append(bar("daemon: process start to first token", COLD_START_S, cold, " s"))
    return found


def main() -> int:
    """Measure and print; keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--executor", choices=("openvino", "onnx"), default="openvino")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, default=ROOT / ".tidegate" / "bench")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.repeats = "tiny", 1
    work = args.work / args.shape
    ours = Tidegate(name="ours", choice=args.executor, native=None)
    prepared = ours.prepare(checkpoint_of(args.shape, work), work)
    turn = Turn(
        threads=args.threads,
        prompt_tokens=32 if args.quick else 128,
        decode_tokens=args.decode_tokens,
        streams=(STREAMS,),
        prefills=0,
    )
    rounds: list[ServiceRound] = []
    for number in range(args.repeats):
        tell(f"round {number + 1} of {args.repeats}")
        rounds.append(run_round(prepared, args.executor, replace(turn, seed=number)))
        tell(str(rounds[-1]))
    bars = verdict(rounds, prepared.weight_bytes, args.shape)
    body = {
        "shape": args.shape,
        "executor": args.executor,
        "native": native_problem() or "runs",
        "turn": asdict(turn),
        "weight_bytes": prepared.weight_bytes,
        "rounds": [asdict(one) for one in rounds],
        "bars": [{**asdict(one), "verdict": one.verdict} for one in bars],
    }
    text = report("edge/service.py", ("numpy", "onnxruntime", "openvino", "uvicorn"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else "\n".join(one.line for one in bars))
    return 0


if __name__ == "__main__":
    sys.exit(main())
