"""The first token of a long prompt from the daemon: cold, with its prefix in RAM, after a restart.

The daemon keeps prefixes in a folder. It is stopped, the kernel is told to forget the folder's
files, and a new one is started: what comes then was read from the disk.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.contract import PeerError, Prepared, Turn
from peers.daemon import CACHE, Daemon, completion, stream_together

ENDS, END_TOKENS = 3, 20
BLOCK_TOKENS = 32
_WRITE_TIMEOUT_S = 60
_METRIC = re.compile(r"^tidegate_prefix_disk_units\S* ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Restarted:
    """Seconds to the first token, medians of `prefixes` prompts each."""

    prefixes: int
    cold_s: float
    ram_s: float
    disk_s: float


def restart(prepared: Prepared, executor: str, turn: Turn, prefixes: int) -> Restarted:
    """Ask one daemon, stop it, ask the next.

    Raises:
        PeerError: a daemon did not start or answer, or prefixes did not reach the disk.
    """
    folder = prepared.model.parent / f"prefixes-{executor}"
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(turn.seed)
    asked = [_tokens(rng, prepared.vocab, turn.prefix_tokens) for _ in range(prefixes)]
    context = turn.prefix_tokens + END_TOKENS + BLOCK_TOKENS
    sizes = {"rows": 2, "context": context, "threads": turn.threads}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    flags += ["--executor", executor, "--prefix-cache", str(folder)]
    flags += ["--cache-dir", str(prepared.model.parent / CACHE)]
    log = prepared.model.parent / "restart.log"

    def first_token_s(daemon: Daemon, prompt: Sequence[int]) -> float:
        whole = [*prompt, *_tokens(rng, prepared.vocab, END_TOKENS)]
        began_s = time.perf_counter()
        (streamed,) = stream_together(daemon.port, [completion(whole, 1)])
        return streamed.texts_s[0] - began_s

    def warm_up(daemon: Daemon) -> None:
        first_token_s(daemon, _tokens(rng, prepared.vocab, turn.prompt_tokens))

    cold, ram = [], []
    with Daemon(prepared.model, flags, log) as daemon:
        warm_up(daemon)
        for prompt in asked:
            cold.append(first_token_s(daemon, prompt))
            ram += [first_token_s(daemon, prompt) for _ in range(ENDS)]
        _until_written(daemon, prefixes * (turn.prefix_tokens // BLOCK_TOKENS))
    forget_pages(folder)
    with Daemon(prepared.model, flags, log) as daemon:
        warm_up(daemon)
        disk = [first_token_s(daemon, prompt) for prompt in asked]
    shutil.rmtree(folder)
    return Restarted(
        prefixes=prefixes,
        cold_s=statistics.median(cold),
        ram_s=statistics.median(ram),
        disk_s=statistics.median(disk),
    )


def forget_pages(folder: Path) -> None:
    """Drop the folder's files from the page cache, once they are on the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _tokens(rng: random.Random, vocab: int, count: int) -> list[int]:
    """Random ids, without those of single bytes, which may be no whole character."""
    return [rng.randrange(min(300, vocab - 2), vocab) for _ in range(count)]


def _until_written(daemon: Daemon, units: int) -> None:
    deadline_s = time.perf_counter() + _WRITE_TIMEOUT_S
    while time.perf_counter() < deadline_s:
        with urllib.request.urlopen(f"http://127.0.0.1:{daemon.port}/metrics") as response:
            found = _METRIC.search(response.read().decode())
        if found is not None and float(found[1]) >= units:
            return
        time.sleep(0.2)
    raise PeerError(f"fewer than {units} units of prefixes reached the disk")
