"""Rounds of turns: every engine once, in the same order; kept as they come, so a run can go on.

What the machine does besides hits the engines of a round alike, so two engines are compared by the
ratio within each round, and the median of those ratios counts. A run that was interrupted leaves
`rounds.jsonl`; started again with the same plan it takes only the turns that are missing.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peers.contract import Figures, Peer, PeerError, Prepared, Turn
from peers.machine import read_gb_per_s
from peers.process import read_figures

Pick = Callable[[Figures], float | None]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One turn of every engine, and the memory's speed just before."""

    read_gb_per_s: float
    figures: Mapping[str, Figures]


def run_rounds(
    engines: Sequence[tuple[Peer, Prepared]],
    turn: Turn,
    repeats: int,
    work: Path,
    failed: dict[str, str],
) -> list[Round]:
    """Let the engines take turns; what an interrupted run of the same plan left counts.

    Args:
        engines: in the order of their turns.
        turn: what each process is asked to do; only the seed changes.
        repeats: rounds.
        work: where finished turns are kept until the run is complete.
        failed: gets the engines that failed, by name; they take no further turns.
    """
    log = work / f"rounds-{plan_digest(engines, turn, repeats)}.jsonl"
    taken = read_log(log)
    rounds: list[Round] = []
    for number in range(repeats):
        rate = taken.get((number, ""))
        if rate is None:
            rate = {"read_gb_per_s": read_gb_per_s(turn.threads)}
            append(log, number, "", rate)
        figures: dict[str, Figures] = {}
        for place, (peer, prepared) in enumerate(engines):
            if peer.name in failed:
                continue
            body = taken.get((number, peer.name))
            if body is None:
                tell(f"round {number + 1} of {repeats}, {place + 1} of {len(engines)}: {peer.name}")
                seed = 1000 * number + place
                try:
                    body = take(peer, prepared, replace(turn, seed=seed))
                except PeerError as error:
                    failed[peer.name] = f"failed in round {number + 1}: {error}"
                    tell(f"{peer.name} {failed[peer.name]}")
                    continue
                append(log, number, peer.name, body)
            figures[peer.name] = read_figures(body)
        rounds.append(Round(read_gb_per_s=float(str(rate["read_gb_per_s"])), figures=figures))
    log.unlink()
    return rounds


def take(peer: Peer, prepared: Prepared, turn: Turn) -> dict[str, object]:
    """One turn, of the streams that the peer is asked for."""
    asked = turn.streams if peer.streams is None else peer.streams
    streams = tuple(count for count in turn.streams if count in asked)
    return asdict(peer.run(prepared, replace(turn, streams=streams)))


def plan_digest(engines: Sequence[tuple[Peer, Prepared]], turn: Turn, repeats: int) -> str:
    """Of everything that makes two runs the same."""
    names = [(peer.name, peer.settings) for peer, _ in engines]
    text = json.dumps([names, asdict(turn), repeats])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_log(log: Path) -> dict[tuple[int, str], dict[str, object]]:
    """The turns that were taken; a line that was cut short counts as none."""
    taken: dict[tuple[int, str], dict[str, object]] = {}
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            taken[entry["round"], entry["engine"]] = entry["figures"]
        tell(f"going on after {len(taken)} turns of an interrupted run")
    return taken


def append(log: Path, number: int, engine: str, figures: Mapping[str, object]) -> None:
    """Keep one turn."""
    with log.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"round": number, "engine": engine, "figures": figures}) + "\n")


def tell(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def median(rounds: Sequence[Round], engine: str, pick: Pick) -> float | None:
    """Of one engine's figure over all rounds; None where it has none."""
    found = [pick(one.figures[engine]) for one in rounds if engine in one.figures]
    values = [value for value in found if value is not None]
    return statistics.median(values) if values else None


def ratio(rounds: Sequence[Round], ours: str, theirs: str, pick: Pick) -> float | None:
    """The median of the rounds' ratios; None where one of them has no such figure."""
    found: list[float] = []
    for one in rounds:
        if ours in one.figures and theirs in one.figures:
            ahead, behind = pick(one.figures[ours]), pick(one.figures[theirs])
            if ahead is not None and behind:
                found.append(ahead / behind)
    return statistics.median(found) if found else None


def prefill(figures: Figures) -> float | None:
    """Tokens per second of a prompt."""
    return figures.prefill_tokens_per_s


def decode(streams: int) -> Pick:
    """Tokens per second of so many streams together."""
    return lambda figures: figures.decode_tokens_per_s.get(streams)
