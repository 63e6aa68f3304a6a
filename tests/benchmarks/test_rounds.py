"""Rounds of turns: compared within a round, kept as they come, resumed where they stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

contract: Any = import_module("peers.contract")
rounds: Any = import_module("peers.rounds")
bars: Any = import_module("peers.bars")
engines: Any = import_module("peers.engines")


@dataclass
class Clockwork:
    """An engine that gives the speeds it was made with, one per turn, or fails as it was told."""

    name: str
    speeds: list[float | Exception]
    settings: str = "none"
    streams: tuple[int, ...] | None = None
    turns: list[Any] = field(default_factory=list)

    def missing(self) -> str | None:
        return None

    def prepare(self, checkpoint: Path, work: Path) -> Any:
        return prepared()

    def run(self, prepared: Any, turn: Any) -> Any:
        speed = self.speeds.pop(0)
        if isinstance(speed, Exception):
            raise speed
        self.turns.append(turn)
        return figures(speed)


def prepared() -> Any:
    return contract.Prepared(model=Path("m"), weight_bytes=100, step_bytes=80, vocab=9)


def figures(speed: float) -> Any:
    return contract.Figures(
        cold_start_s=1.0,
        prefill_tokens_per_s=10 * speed,
        decode_tokens_per_s={1: speed, 4: 2 * speed, 8: 3 * speed},
        rss_mib=300.0,
        kv_bytes=2**20,
    )


@pytest.fixture
def turn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A turn; memory is not measured, which would take seconds."""
    quick: Callable[[int], float] = lambda threads: 30.0  # noqa: E731
    monkeypatch.setattr(rounds, "read_gb_per_s", quick)
    return contract.Turn(threads=2, prompt_tokens=8, decode_tokens=4, streams=(1, 4, 8), prefills=1)


def test_a_ratio_is_taken_within_each_round(turn: Any, tmp_path: Path) -> None:
    # The machine is ten times slower in the second round; the ratio does not notice.
    ours, theirs = Clockwork("ours", [30.0, 3.0, 36.0]), Clockwork("theirs", [20.0, 2.0, 20.0])
    pairs = [(ours, prepared()), (theirs, prepared())]
    found = rounds.run_rounds(pairs, turn, 3, tmp_path, {})
    assert rounds.ratio(found, "ours", "theirs", rounds.decode(1)) == 1.5
    assert rounds.median(found, "ours", rounds.prefill) == 300.0
    assert rounds.ratio(found, "ours", "nobody", rounds.decode(1)) is None
    assert rounds.ratio(found, "ours", "theirs", rounds.decode(2)) is None


def test_an_interrupted_run_goes_on_with_the_turns_that_are_missing(
    turn: Any, tmp_path: Path
) -> None:
    cut = OSError("power cut")
    ours, theirs = Clockwork("ours", [30.0, 31.0]), Clockwork("theirs", [20.0, cut, 22.0])
    pairs = [(ours, prepared()), (theirs, prepared())]
    with pytest.raises(OSError, match="power cut"):
        rounds.run_rounds(pairs, turn, 2, tmp_path, {})
    (log,) = tmp_path.iterdir()
    with log.open("a") as out:
        out.write('{"round": 1, "engi')  # what a power cut leaves
    found = rounds.run_rounds(pairs, turn, 2, tmp_path, {})
    assert (len(ours.turns), len(theirs.turns)) == (2, 2)
    assert [one.figures["theirs"].decode_tokens_per_s[8] for one in found] == [60.0, 66.0]
    assert not list(tmp_path.iterdir())


def test_an_engine_that_fails_is_named_and_the_others_go_on(turn: Any, tmp_path: Path) -> None:
    broken = contract.PeerError("no such instruction")
    ours, theirs = Clockwork("ours", [30.0, 31.0]), Clockwork("theirs", [20.0, broken])
    failed: dict[str, str] = {}
    pairs = [(ours, prepared()), (theirs, prepared())]
    found = rounds.run_rounds(pairs, turn, 2, tmp_path, failed)
    assert failed == {"theirs": "failed in round 2: no such instruction"}
    assert [set(one.figures) for one in found] == [{"ours", "theirs"}, {"ours"}]


def test_every_turn_brings_its_own_tokens(turn: Any, tmp_path: Path) -> None:
    ours, theirs = Clockwork("ours", [1.0, 1.0]), Clockwork("theirs", [1.0, 1.0], streams=(1, 2))
    rounds.run_rounds([(ours, prepared()), (theirs, prepared())], turn, 2, tmp_path, {})
    assert len({one.seed for one in (*ours.turns, *theirs.turns)}) == 4
    assert {one.streams for one in theirs.turns} == {(1,)}
    assert {one.streams for one in ours.turns} == {(1, 4, 8)}


def test_a_bar_without_its_peer_is_not_judged(turn: Any, tmp_path: Path) -> None:
    pairs = [(Clockwork(engines.LIBRARY, [40.0]), prepared())]
    found = rounds.run_rounds(pairs, turn, 1, tmp_path, {})
    made = bars.speed_bars(found, {engines.LIBRARY: prepared()}, cold_start=True)
    verdicts = {one.what: one.verdict for one in made}
    assert {v for what, v in verdicts.items() if " / " in what} == {"not judged"}
    assert verdicts[f"cold start to first token: {engines.LIBRARY}"] == "met"
    # 300 MiB of which 1 is KV and next to none weights
    assert verdicts[f"RSS beyond weights and KV: {engines.LIBRARY}"] == "MISSED"


def test_bars_are_met_at_their_value_and_missed_below(turn: Any, tmp_path: Path) -> None:
    names = (engines.NATIVE, engines.LLAMA, engines.OPENVINO)
    speeds = zip(names, (24.0, 10.0, 20.0), strict=True)
    pairs = [(Clockwork(name, [speed]), prepared()) for name, speed in speeds]
    found = rounds.run_rounds(pairs, turn, 1, tmp_path, {})
    ready = {name: prepared() for name in names}
    made = {one.what: one for one in bars.speed_bars(found, ready, cold_start=False)}
    assert made[f"decode, 8 streams: {engines.NATIVE} / {engines.LLAMA}"].verdict == "met"
    assert made[f"decode, 8 streams: {engines.NATIVE} / {engines.OPENVINO}"].verdict == "MISSED"
    assert not any("cold start" in what for what in made)
    share = bars.share_of_bandwidth(found, engines.NATIVE, 10**9)
    assert share == pytest.approx(24 / 30)
