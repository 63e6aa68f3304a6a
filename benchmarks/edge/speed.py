"""Speed of ours and of every peer on one shape: prefill, decode, cold start, memory, bandwidth.

Random weights in the shape of a published model are converted for everyone; then every engine
takes its turn in a process of its own, round after round, with two threads and prompts of 128
random tokens. Ratios are within a round and their medians count. Peers live in environments of
their own (benchmarks/peers/environments.py builds them); one that is missing is named. A run that
is interrupted goes on where it was when the same command is given again.

    python benchmarks/peers/environments.py
    python benchmarks/edge/speed.py --shape tinyllama-1.1b --repeats 5 \
        --keep benchmarks/results/speed-tinyllama-1.1b.json
    python benchmarks/edge/speed.py --quick
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from converters.synthetic import SHAPES  # noqa: E402
from peers.bars import COLD_START_SHAPE, share_of_bandwidth, speed_bars  # noqa: E402
from peers.contract import Peer, Prepared, Turn  # noqa: E402
from peers.engines import every_engine  # noqa: E402
from peers.environments import NAMES, pins  # noqa: E402
from peers.rounds import Round, decode, median, prefill, run_rounds  # noqa: E402
from peers.starting import prepare_all  # noqa: E402
from report import report  # noqa: E402

STREAMS = (1, 2, 4, 8)


def summary(
    engines: Sequence[tuple[Peer, Prepared]], rounds: Sequence[Round], streams: Sequence[int]
) -> list[dict[str, object]]:
    """Medians of every engine."""
    found: list[dict[str, object]] = []
    for peer, prepared in engines:
        name = peer.name
        if not any(name in one.figures for one in rounds):
            continue  # it failed in its first turn, and is named among the missing
        speeds = {count: median(rounds, name, decode(count)) for count in streams}
        found.append(
            {
                "engine": name,
                "settings": peer.settings,
                "cold_start_s": median(rounds, name, lambda one: one.cold_start_s),
                "prefill_tokens_per_s": median(rounds, name, prefill),
                "decode_tokens_per_s": {k: v for k, v in speeds.items() if v is not None},
                "share_of_bandwidth": share_of_bandwidth(rounds, name, prepared.step_bytes),
                "rss_mib": median(rounds, name, lambda one: one.rss_mib),
                "anonymous_mib": median(rounds, name, lambda one: one.anonymous_mib),
                "peak_mib": median(rounds, name, lambda one: one.peak_mib),
                "weight_mb": prepared.weight_bytes / 1e6,
                "step_mb": prepared.step_bytes / 1e6,
                "energy_j": median(rounds, name, lambda one: one.energy_j),
            }
        )
    return found


def table(rows: Sequence[Mapping[str, object]], streams: Sequence[int]) -> list[str]:
    """Lines for people."""
    heads = [
        "cold s",
        "prefill",
        *(f"x{count}" for count in streams),
        "of mem",
        "RSS MiB",
        "anon",
        "J",
    ]
    lines = [f"{'':<27}" + "".join(f"{head:>9}" for head in heads)]
    for row in rows:
        speeds = row["decode_tokens_per_s"]
        assert isinstance(speeds, dict)
        values = [row["cold_start_s"], row["prefill_tokens_per_s"], *map(speeds.get, streams)]
        cells = [
            f"{value:.2f}" if i == 0 else f"{value:.1f}" if isinstance(value, float) else "-"
            for i, value in enumerate(values)
        ]
        share, rss, energy = row["share_of_bandwidth"], row["rss_mib"], row["energy_j"]
        cells.append(f"{share:.0%}" if isinstance(share, float) else "-")
        cells += [f"{rss:.0f}", f"{row['anonymous_mib']:.0f}"]
        cells.append(f"{energy:.0f}" if isinstance(energy, float) else "-")
        lines.append(f"{row['engine']:<27}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def arguments() -> argparse.Namespace:
    """What the command line says; `--quick` makes everything small."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--engines", nargs="+", help="only those whose name holds one of these")
    parser.add_argument("--work", type=Path, default=ROOT / ".tidegate" / "bench")
    parser.add_argument("--prepare", action="store_true", help="only convert for everyone")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.repeats, args.decode_tokens = "tiny", 1, 4
    return args


def main() -> int:
    """Measure, print the table, the missing and the bars; keep it all as JSON."""
    args = arguments()
    work = args.work / args.shape
    wanted = every_engine(args.engines)
    streams = (1, 2) if args.quick else STREAMS
    turn = Turn(
        threads=args.threads,
        prompt_tokens=16 if args.quick else 128,
        decode_tokens=args.decode_tokens,
        streams=streams,
        prefills=1 if args.quick else 3,
    )
    engines, missing = prepare_all(args.shape, work, wanted)
    if args.prepare:
        print("\n".join(f"missing: {name}: {reason}" for name, reason in missing.items()))
        return 0
    rounds = run_rounds(engines, turn, args.repeats, work, missing)
    rows = summary(engines, rounds, streams)
    bars = speed_bars(
        rounds,
        {peer.name: prepared for peer, prepared in engines},
        cold_start=args.shape == COLD_START_SHAPE,
    )
    read = sorted(one.read_gb_per_s for one in rounds)[len(rounds) // 2]
    energy = "read" if any(row["energy_j"] is not None for row in rows) else "not readable"
    body = {
        "shape": args.shape,
        "turn": asdict(turn),
        "repeats": args.repeats,
        "read_gb_per_s": read,
        "energy": energy,
        "engines": rows,
        "missing": missing,
        "peers": {name: pins(name) for name in NAMES},
        "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in bars],
        "rounds": [asdict(one) for one in rounds],
    }
    text = report("edge/speed.py", ("numpy", "onnxruntime", "openvino"), body)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return 0
    print(
        f"{args.shape}, {args.threads} threads, tokens/s; memory reads {read:.1f} GB/s;"
        f" energy {energy}"
    )
    print("\n".join(table(rows, streams)))
    print("\n".join(f"missing: {name}: {reason}" for name, reason in missing.items()))
    print("\n".join(bar.line for bar in bars))
    return 0


if __name__ == "__main__":
    sys.exit(main())
