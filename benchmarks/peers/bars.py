"""The bars that a run is held to, each met, missed, or not judged and why.

A bar names what it compares; figures that only this machine's reader needs are in the table above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peers.contract import Figures, Prepared
from peers.engines import GENAI_32, GENAI_64, LIBRARY, LLAMA, NATIVE, ONNX, OPENVINO, OPENVINO_PLAIN
from peers.rounds import Pick, Round, decode, median, prefill, ratio

RSS_SLACK_MIB = 250
COLD_START_S = 2.5
COLD_START_SHAPE = "tinyllama-1.1b"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of the verdict."""

    what: str
    bar: float
    kind: Literal["at least", "at most"]
    value: float | None
    """None where something it needs is missing."""
    unit: str = "x"

    @property
    def verdict(self) -> str:
        """`met`, `MISSED` or `not judged`."""
        if self.value is None:
            return "not judged"
        met = self.value >= self.bar if self.kind == "at least" else self.value <= self.bar
        return "met" if met else "MISSED"

    @property
    def line(self) -> str:
        """For people."""
        value = "-" if self.value is None else f"{self.value:.2f}{self.unit}"
        return f"{self.verdict:<11} {self.what:<62} {value:>9}  {self.kind} {self.bar:g}{self.unit}"


def speed_bars(
    rounds: Sequence[Round], prepared: Mapping[str, Prepared], *, cold_start: bool
) -> list[Bar]:
    """Of a run of `benchmarks/edge/speed.py`. Ours is the native path where it runs.

    The bar of a cold start is one shape's; `cold_start` says whether it is this one.
    """
    best = NATIVE if NATIVE in prepared else LIBRARY

    def over(ours: str, theirs: str, what: str, pick: Pick, bar: float) -> Bar:
        value = ratio(rounds, ours, theirs, pick)
        return Bar(what=f"{what}: {ours} / {theirs}", bar=bar, kind="at least", value=value)

    bars = [
        over(NATIVE, LLAMA, "decode, 1 stream", decode(1), 1.15),
        over(LIBRARY, LLAMA, "decode, 1 stream", decode(1), 0.75),
        over(best, LLAMA, "decode, 4 streams", decode(4), 2.0),
        over(best, LLAMA, "decode, 8 streams", decode(8), 2.4),
        over(best, OPENVINO, "decode, 4 streams", decode(4), 1.25),
        over(best, OPENVINO, "decode, 8 streams", decode(8), 1.25),
        over(best, LLAMA, "prefill", prefill, 2.2),
    ]
    # Where a peer runs in two ways, its quicker one is the bar.
    reader = quicker(rounds, (OPENVINO, OPENVINO_PLAIN), prefill)
    bars.append(over(best, reader, "prefill", prefill, 1.1))
    genai = quicker(rounds, (GENAI_32, GENAI_64), decode(1))
    bars.append(over(ONNX, genai, "decode, 1 stream", decode(1), 1.5))
    for engine in (NATIVE, LIBRARY, ONNX):
        if engine in prepared:
            bars += [cold_start_bar(rounds, engine)] if cold_start else []
            bars.append(rss_bar(rounds, engine, prepared[engine]))
    return bars


def quicker(rounds: Sequence[Round], names: Sequence[str], pick: Pick) -> str:
    """The engine with the higher median; the first where none has one."""
    return max(names, key=lambda name: median(rounds, name, pick) or 0.0)


def cold_start_bar(rounds: Sequence[Round], engine: str) -> Bar:
    """Process start to first token, without the HTTP service."""
    value = median(rounds, engine, lambda one: one.cold_start_s)
    what = f"cold start to first token: {engine}"
    return Bar(what=what, bar=COLD_START_S, kind="at most", value=value, unit=" s")


def rss_bar(rounds: Sequence[Round], engine: str, prepared: Prepared) -> Bar:
    """Resident memory beyond weights and KV."""

    def beyond_mib(one: Figures) -> float | None:
        if one.kv_bytes is None:
            return None
        return one.rss_mib - (prepared.weight_bytes + one.kv_bytes) / 2**20

    value = median(rounds, engine, beyond_mib)
    what = f"RSS beyond weights and KV: {engine}"
    return Bar(what=what, bar=RSS_SLACK_MIB, kind="at most", value=value, unit=" MiB")


def share_of_bandwidth(rounds: Sequence[Round], engine: str, step_bytes: int) -> float | None:
    """Of one stream: bytes of weights read per second over what memory gave in that round."""
    shares = [
        one.figures[engine].decode_tokens_per_s[1] * step_bytes / one.read_gb_per_s / 1e9
        for one in rounds
        if engine in one.figures and 1 in one.figures[engine].decode_tokens_per_s
    ]
    return sorted(shares)[len(shares) // 2] if shares else None
