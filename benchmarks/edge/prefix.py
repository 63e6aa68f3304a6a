"""Time to the first token with and without a cached prefix, ours beside the peers that have one.

Prompts of 1 500 random tokens and 20 more. Cold: nobody has seen the prefix; warm: the same prefix
with another end, the median of three, straight from RAM. Every engine reuses a prefix in its own
way: ours and OpenVINO GenAI by blocks or slots with the prefix cache on, llama.cpp by cutting its
sequence where prompts part, onnxruntime-genai by rewinding its generator. Ours goes through the
engine, so that the time includes scheduling. The ratio is within a turn, its median counts.

Then through our daemon, with a folder for prefixes: cold, from RAM, and after a restart, for which
the kernel is told to forget the folder's files, so that they come from the disk.

    python benchmarks/edge/prefix.py --shape tinyllama-1.1b --repeats 3 \
        --keep benchmarks/results/prefix.json
    python benchmarks/edge/prefix.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from converters.synthetic import SHAPES  # noqa: E402
from peers.bars import Bar  # noqa: E402
from peers.contract import Figures, PeerError, Turn  # noqa: E402
from peers.engines import GENAI_64, LIBRARY, NATIVE, ONNX, OPENVINO_PLAIN, every_engine  # noqa: E402
from peers.restart import Restarted, restart  # noqa: E402
from peers.rounds import Round, median, run_rounds, tell  # noqa: E402
from peers.starting import prepare_all  # noqa: E402
from report import report  # noqa: E402

PREFIX_TOKENS = 1500
FROM_RAM, FROM_DISK = 0.1, 0.2


def part(figures: Figures) -> float | None:
    """Warm over cold, of one turn."""
    if figures.prefix_cold_s is None or figures.prefix_warm_s is None:
        return None
    return figures.prefix_warm_s / figures.prefix_cold_s


def bars(rounds: Sequence[Round]) -> list[Bar]:
    """Only ours is held to one."""
    return [
        Bar(
            what=f"first token with a prefix in RAM / cold: {engine}",
            bar=FROM_RAM,
            kind="at most",
            value=median(rounds, engine, part),
        )
        for engine in (NATIVE, LIBRARY, ONNX)
    ]


def daemon_bars(found: Mapping[str, Restarted]) -> list[Bar]:
    """The daemon's prefixes, by executor."""
    return [
        Bar(
            what=f"daemon, {executor}: first token, prefix {where} / cold",
            bar=bar,
            kind="at most",
            value=value,
        )
        for executor, one in found.items()
        for where, bar, value in (
            ("in RAM", FROM_RAM, one.ram_s / one.cold_s),
            ("on disk, restarted", FROM_DISK, one.disk_s / one.cold_s),
        )
    ]


def rows(rounds: Sequence[Round]) -> list[dict[str, object]]:
    """Medians of every engine."""
    return [
        {
            "engine": engine,
            "cold_s": median(rounds, engine, lambda one: one.prefix_cold_s),
            "warm_s": median(rounds, engine, lambda one: one.prefix_warm_s),
            "part": median(rounds, engine, part),
        }
        for engine in rounds[-1].figures
    ]


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", nargs="+", help="only those whose name holds one of these")
    parser.add_argument("--work", type=Path, default=ROOT / ".tidegate" / "bench")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.repeats = "tiny", 1
    # The group does not matter here, and LLMPipeline keeps no prefix of a request.
    without = (GENAI_64, OPENVINO_PLAIN)
    wanted = [one for one in every_engine(args.engines) if one.name not in without]
    engines, missing = prepare_all(args.shape, args.work / args.shape, wanted)
    turn = Turn(
        threads=args.threads,
        prompt_tokens=128,
        decode_tokens=1,
        streams=(),
        prefills=0,
        prefix_tokens=PREFIX_TOKENS,
    )
    rounds = run_rounds(engines, turn, args.repeats, args.work / args.shape, missing)
    restarted: dict[str, Restarted] = {}
    ours = next((prepared for peer, prepared in engines if peer.name == LIBRARY), None)
    for executor in ("openvino", "onnx") if ours is not None else ():
        tell(f"restarting the daemon, {executor}")
        prefixes = 1 if args.quick else args.repeats
        try:
            restarted[executor] = restart(ours, executor, turn, prefixes)
        except PeerError as error:
            missing[f"daemon with prefixes on disk, {executor}"] = str(error)
    verdicts, lines = [*bars(rounds), *daemon_bars(restarted)], rows(rounds)
    body = {
        "shape": args.shape,
        "turn": asdict(turn),
        "read_gb_per_s": statistics.median(one.read_gb_per_s for one in rounds),
        "engines": lines,
        "daemon": {name: asdict(one) for name, one in restarted.items()},
        "missing": missing,
        "bars": [{**asdict(one), "verdict": one.verdict} for one in verdicts],
        "rounds": [asdict(one) for one in rounds],
    }
    text = report("edge/prefix.py", ("numpy", "onnxruntime", "openvino"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return 0
    print(f"{args.shape}, {args.threads} threads, {PREFIX_TOKENS} tokens of prefix")
    for one in lines:
        times = f"cold {one['cold_s']:>8.3f} s  warm {one['warm_s']:>8.3f} s"
        print(f"{one['engine']:<27} {times}  x{one['part']:.3f}")
    for name, again in restarted.items():
        times = f"cold {again.cold_s:.3f} s  RAM {again.ram_s:.3f} s  disk {again.disk_s:.3f} s"
        print(f"daemon, {name:<17} {times}")
    print("\n".join(f"missing: {name}: {reason}" for name, reason in missing.items()))
    print("\n".join(one.line for one in verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
