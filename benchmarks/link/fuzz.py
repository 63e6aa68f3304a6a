"""Fuzzes everything of the link that reads bytes of others, for some minutes, in one process.

sealed    mutated messages of live sessions, both suites, at the envelope: each is refused with the
          one error
cores     the same at whole gateway and device cores: nothing raised, each counted as dropped
insiders  mutated plaintexts, sealed and signed with the right keys, as a broken or hostile peer
          would: nothing raised
adverts   mutated adverts, and mutated fields under a right signature: read, or refused by name
plain     mutated plaintexts at their decoders: a value, or a ValueError
http      mutated frames, headers and signed words of the HTTP path: read, or refused by name

A crash is whatever else comes out; it is printed with its input, and the run goes on.

python benchmarks/link/fuzz.py --minutes 10 --keep benchmarks/results/link-fuzz.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from link.children import import_paths  # noqa: E402
from link.mutations import json_value, mutate  # noqa: E402

sys.path[1:1] = import_paths()

import psutil  # noqa: E402
from link.fuzz_cores import Cores  # noqa: E402
from link.fuzz_http import HttpReaders  # noqa: E402
from linklab import Peers, new_peers  # noqa: E402
from report import report  # noqa: E402

from tidegate.errors import IdentityError, SealError  # noqa: E402
from tidegate.link import statements  # noqa: E402
from tidegate.link.assembly import Assembler  # noqa: E402
from tidegate.link.envelope import route  # noqa: E402
from tidegate.link.messages import (  # noqa: E402
    Bundle,
    Call,
    Control,
    ControlKind,
    Prefix,
    Status,
)
from tidegate.link.prekeys import open_advert  # noqa: E402
from tidegate.link.suites import SUITES  # noqa: E402
from tidegate.link.wire import FRAGMENT_BYTES  # noqa: E402

FRESH_EVERY = 2000
"""Inputs after which sessions are made anew."""
CONSTANT = "message could not be opened"


@dataclass
class Result:
    """What was done, by target and by mutation, and what came out wrong."""

    inputs: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    crashes: list[dict[str, str]] = field(default_factory=list)

    def wrong(self, target: str, problem: str, data: bytes) -> None:
        crash = {"target": target, "problem": problem, "input": data[:2000].hex()}
        print(json.dumps(crash), file=sys.stderr)
        self.crashes.append(crash)


Act = Callable[[bytes], object]


def sealed_targets(rng: random.Random) -> list[tuple[str, bytes, Act]]:
    """Name, a right message, and what reads it, of a fresh session of each suite."""
    targets: list[tuple[str, bytes, Act]] = []
    for suite in SUITES:
        peers: Peers = new_peers(suite)
        message, device = peers.seal(rng.randbytes(rng.randrange(600)))
        gateway = peers.open(message)
        signed = gateway.seal_response(rng.randbytes(rng.randrange(300)), final=False)
        control = device.seal_control(bytes(16))
        gateway.open_control(device.seal_control(b""))
        bare = gateway.seal_response(rng.randbytes(rng.randrange(300)), final=True)
        device.open_response(signed)
        parts, _ = peers.seal_all(bytes(FRAGMENT_BYTES))
        partial = peers.open_first(parts[0])
        waiting = Assembler(lambda handle, data, peers=peers: peers.open_first(data, handle=handle))
        waiting.receive(0.0, peers.handle, parts[0])
        targets += [
            (f"request {suite}", message, peers.open),
            (f"answer {suite}", signed, device.open_response),
            (f"bare answer {suite}", bare, device.open_response),
            (f"old control {suite}", control, gateway.open_control),
            (f"control {suite}", device.seal_control(bytes(16)), gateway.open_control),
            (f"part {suite}", parts[1], partial.take),
            (
                f"assembler {suite}",
                parts[1],
                lambda m, a=waiting, h=peers.handle: a.receive(0, h, m),
            ),
        ]
    return targets


def fuzz_sealed(rng: random.Random, result: Result, targets: list[tuple[str, bytes, Act]]) -> None:
    name, message, act = rng.choice(targets)
    mutation, data = mutate(rng, message, rng.choice(targets)[1])
    if any(data == right for _, right, _ in targets):
        return
    result.inputs["sealed"] += 1
    result.mutations[mutation] += 1
    for reads in (act, route):
        try:
            reads(data)
        except SealError as error:
            result.outcomes["sealed: refused"] += reads is act
            if str(error) != CONSTANT or error.__cause__ is not None:
                result.wrong(name, f"says too much: {error}", data)
        except Exception as error:
            result.wrong(name, repr(error), data)
        else:
            if reads is act:
                result.wrong(name, "opened", data)


def fuzz_plain(rng: random.Random, result: Result) -> None:
    prefix = Prefix([b"a"])
    rights: list[tuple[bytes, Act]] = [
        (Call(have=1, credit=9, ttl_ms=5, proof=prefix.proof(), body=b"{}").encode(), Call.decode),
        (Bundle(first=3, payloads=(b"one", b"", b"three")).encode(), Bundle.decode),
        (Bundle(first=3, status=Status.FAILED, code="x").encode(), Bundle.decode),
        (Control(kind=ControlKind.ACK, have=1, credit=2, seen=3).encode(), Control.decode),
    ]
    right, decode = rng.choice(rights)
    mutation, data = mutate(rng, right, rng.choice(rights)[0])
    result.inputs["plain"] += 1
    result.mutations[mutation] += 1
    try:
        decode(data)
        result.outcomes["plain: a value"] += 1
    except ValueError:
        result.outcomes["plain: refused"] += 1
    except Exception as error:
        result.wrong("plain", repr(error), data)


def fuzz_adverts(rng: random.Random, result: Result, cores: Cores) -> None:
    right = cores.advert
    split = 2 + int.from_bytes(right[:2], "big")
    insider = rng.random() < 0.5
    if insider:
        fields = right[split + statements.SIGNATURE_BYTES :]
        if rng.random() < 0.5:
            mutation, fields = "json_value", json_value(rng, fields)
        else:
            mutation, fields = mutate(rng, fields, right)
        # Whoever holds a gateway's key may sign anything, JSON or not.
        signature = cores.gateway_identity.key.sign(b"tidegate/1 advert\0" + fields)
        data = right[:split] + signature + fields
    else:
        mutation, data = mutate(rng, right, rng.randbytes(200))
    if data == right:
        return
    result.inputs["adverts"] += 1
    result.mutations[mutation] += 1
    try:
        open_advert(data, root=cores.root, group="home", now_s=cores.wall_s())
        result.outcomes["adverts: read"] += 1
        if not insider:
            result.wrong("advert", "opened", data)
    except IdentityError:
        result.outcomes["adverts: refused"] += 1
    except Exception as error:
        result.wrong("advert", repr(error), data)
    if problem := cores.take_advert(data):
        result.wrong("advert at a device", problem, data)


def fuzz_cores(rng: random.Random, result: Result, cores: Cores) -> None:
    kind = "insiders" if rng.random() < 0.5 else "cores"
    mutation, data, problem = (cores.insider if kind == "insiders" else cores.outsider)(rng)
    result.inputs[kind] += 1
    result.mutations[mutation] += 1
    if problem:
        result.wrong(kind, problem, data)
    else:
        result.outcomes[f"{kind}: survived"] += 1


def fuzz_http(result: Result, http: HttpReaders) -> None:
    result.inputs["http"] += 1
    try:
        name, mutation, outcome = http.act()
    except Exception as error:
        result.wrong("http", repr(error), b"")
        return
    result.mutations[mutation] += 1
    result.outcomes[f"{name}: {outcome}"] += 1


def run(minutes: float, seed: int) -> dict[str, object]:
    """Fuzz for so long; everything but the keys follows from `seed`."""
    rng, result, process = random.Random(seed), Result(), psutil.Process()
    started_s, rss_mib = time.monotonic(), []
    while time.monotonic() - started_s < minutes * 60:
        with tempfile.TemporaryDirectory() as folder:
            targets, cores = sealed_targets(rng), Cores(Path(folder))
            http = HttpReaders(Path(folder) / "http", rng)
            for _ in range(FRESH_EVERY):
                fuzz_sealed(rng, result, targets)
                fuzz_plain(rng, result)
                fuzz_adverts(rng, result, cores)
                fuzz_cores(rng, result, cores)
                fuzz_http(result, http)
            cores.close()
            http.close()
        rss_mib.append(round(process.memory_info().rss / 2**20, 1))
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - started_s, 1),
        "inputs": {**result.inputs, "all": sum(result.inputs.values())},
        "outcomes": dict(sorted(result.outcomes.items())),
        "mutations": dict(sorted(result.mutations.items())),
        "crashes": result.crashes,
        "rss_mib": {"first": rss_mib[0], "last": rss_mib[-1], "max": max(rss_mib)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    results = run(options.minutes, options.seed)
    text = report("link/fuzz.py", ("cryptography",), results)
    print(text)
    if options.keep is not None:
        options.keep.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if results["crashes"] else 0)


if __name__ == "__main__":
    main()
