"""Runs the scripts of peers: converters to their end, turns for their figures."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from peers.contract import Figures, PeerError, Prepared, Turn

WORKERS = Path(__file__).with_name("workers")
_LOG_CHARS = 2000
_TURN_TIMEOUT_S = 900


def convert(command: Sequence[str], log: Path) -> str:
    """Run a converter; its standard output.

    Raises:
        PeerError: it failed; the message ends with its last lines, the log has all.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=out, env=environment, check=False
        )
    if done.returncode != 0:
        raise PeerError(f"{' '.join(command)}: {_last_lines(log)}")
    return done.stdout.decode(errors="replace")


def once(target: Path, make: Sequence[str]) -> None:
    """Convert into `target` unless an earlier call did; what was interrupted is made anew.

    Raises:
        PeerError: the converter failed.
    """
    if target.exists():
        return
    unfinished = target.with_name(f"{target.name}.unfinished")
    subprocess.run(["rm", "-rf", str(unfinished)], check=True)
    command = [str(unfinished) if part == "{out}" else part for part in make]
    convert(command, target.with_name(f"{target.name}.log"))
    unfinished.rename(target)


def take_turn(
    python: Path,
    script: str,
    prepared: Prepared,
    turn: Turn,
    options: Mapping[str, object],
) -> Figures:
    """Start an engine's script and read what it measured.

    Raises:
        PeerError: it failed, or did not end within 15 minutes.
    """
    spec = {
        **asdict(turn),
        "model": str(prepared.model),
        "vocab": prepared.vocab,
        "options": dict(options),
        "began_s": time.monotonic(),
    }
    command = [str(python), str(WORKERS / script), json.dumps(spec)]
    environment = os.environ | {"OMP_NUM_THREADS": str(turn.threads)}
    log = prepared.model.parent / f"{script}.log"
    with log.open("wb") as out:
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=out,
                env=environment,
                check=False,
                timeout=_TURN_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{script} did not end within {_TURN_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise PeerError(f"{script} ended with {done.returncode}: {_last_lines(log)}")
    return read_figures(json.loads(done.stdout.decode().splitlines()[-1]))


def read_figures(body: Mapping[str, object]) -> Figures:
    """Figures from a script's last line, or from a kept turn."""
    decode = body.get("decode_tokens_per_s")
    speeds = {int(key): value for key, value in decode.items()} if isinstance(decode, dict) else {}
    return Figures(**{**body, "decode_tokens_per_s": speeds})  # type: ignore[arg-type]


def _last_lines(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARS:]
