"""What a turn does, the same for every engine: start, warm up, measure, say it as one JSON line.

Runs in a peer's environment, so it needs nothing but the standard library. An engine's script
brings a `Session` and calls `main`.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Spec = Mapping[str, Any]
"""A `Turn` as JSON, with `model`, `vocab`, `options`, and `began_s`: when the process was started,
on the clock of `time.monotonic`, which all processes of a machine share."""

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
WARM_TOKENS = 8
QUESTION_TOKENS = 20
"""After a cached prefix."""


class Session(Protocol):
    """An engine with its model loaded."""

    def prefill(self, prompt: Sequence[int]) -> None:
        """Read a new prompt until its first token is known; nothing of it may be cached before."""

    def decode(self, prompts: Sequence[Sequence[int]], warm: int, tokens: int) -> float:
        """Seconds for `tokens` steps of all streams, after `warm` steps that do not count."""

    def answer(self, prompt: Sequence[int]) -> None:
        """Until the first token of a prompt that may share a prefix with the one before."""

    @property
    def kv_bytes(self) -> int | None:
        """Configured KV; None where the engine does not say."""


Open = Callable[[Spec], Session]


def prompt(rng: random.Random, spec: Spec, tokens: int) -> list[int]:
    """Random token ids; the first few are special in most vocabularies."""
    return [rng.randrange(10, spec["vocab"]) for _ in range(tokens)]


def measure(spec: Spec, session: Session) -> dict[str, object]:
    """Everything the turn asks for, after a first prompt that counts for the cold start."""
    rng = random.Random(spec["seed"])
    length = spec["prompt_tokens"]
    session.prefill(prompt(rng, spec, length))
    found: dict[str, object] = {"cold_start_s": time.monotonic() - spec["began_s"]}
    energy_before = energy_uj()
    if spec["prefix_tokens"]:
        found |= prefix_times(spec, session, rng)
    if spec["prefills"]:
        times = [timed(session.prefill, prompt(rng, spec, length)) for _ in range(spec["prefills"])]
        found["prefill_tokens_per_s"] = length / statistics.median(times)
    if spec["streams"]:
        found["decode_tokens_per_s"] = decode_speeds(spec, session, rng)
    energy_after = energy_uj()
    if energy_before is not None and energy_after is not None:
        found["energy_j"] = (energy_after - energy_before) / 1e6
    return found | memory() | {"kv_bytes": session.kv_bytes}


def decode_speeds(spec: Spec, session: Session, rng: random.Random) -> dict[int, float]:
    """Tokens per second of all streams together, by their number."""
    prompts = [prompt(rng, spec, spec["prompt_tokens"]) for _ in range(max(spec["streams"]))]
    speeds: dict[int, float] = {}
    for count in spec["streams"]:
        elapsed_s = session.decode(prompts[:count], WARM_TOKENS, spec["decode_tokens"])
        speeds[count] = count * spec["decode_tokens"] / elapsed_s
    return speeds


def prefix_times(spec: Spec, session: Session, rng: random.Random) -> dict[str, object]:
    """A long prompt nobody has seen, then the same with other ends."""
    prefix = prompt(rng, spec, spec["prefix_tokens"])
    ends = [prompt(rng, spec, QUESTION_TOKENS) for _ in range(4)]
    cold_s = timed(session.answer, prefix + ends[0])
    warm_s = [timed(session.answer, prefix + end) for end in ends[1:]]
    return {"prefix_cold_s": cold_s, "prefix_warm_s": statistics.median(warm_s)}


def timed(call: Callable[[Sequence[int]], None], tokens: Sequence[int]) -> float:
    """Seconds that it takes."""
    began_s = time.perf_counter()
    call(tokens)
    return time.perf_counter() - began_s


def memory() -> dict[str, object]:
    """Resident memory now, of it what no file backs, and its peak, in MiB, as the kernel counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    found = {"rss_mib": "VmRSS", "anonymous_mib": "RssAnon", "peak_mib": "VmHWM"}
    return {name: kib[key] / 1024 for name, key in found.items()}


def energy_uj() -> int | None:
    """The package's counter; None where there is none, or only root may read it."""
    try:
        return int(RAPL.read_text())
    except OSError:
        return None


def main(opened: Open) -> None:
    """Argument: the turn as JSON. The last line printed is the answer."""
    spec = json.loads(sys.argv[1])
    print(json.dumps(measure(spec, opened(spec))), flush=True)
