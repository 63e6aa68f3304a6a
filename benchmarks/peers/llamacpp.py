"""llama.cpp as a peer: Q4_0, compiled for this machine, through its C interface."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from peers.contract import Figures, Prepared, Turn
from peers.environments import problem, python
from peers.process import WORKERS, convert, take_turn


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """See `Peer`."""

    name: str
    streams: tuple[int, ...] | None = None
    settings: str = (
        "Q4_0 by its own quantiser, repacked for this processor; flash attention, n_batch 2048,"
        " n_ubatch 512, KV f16 of its own for every sequence"
    )

    def missing(self) -> str | None:
        """See `Peer.missing`."""
        return problem("llama")

    def prepare(self, checkpoint: Path, work: Path) -> Prepared:
        """See `Peer.prepare`."""
        model, facts = work / "q4_0.gguf", work / "q4_0.json"
        if not facts.exists():
            script = str(WORKERS / "write_gguf.py")
            command = [str(python("llama")), script, str(checkpoint), str(model)]
            facts.write_text(convert(command, work / "q4_0.log").splitlines()[-1])
        config = json.loads((checkpoint / "config.json").read_text())
        return Prepared(
            model=model,
            weight_bytes=model.stat().st_size,
            step_bytes=json.loads(facts.read_text())["step_bytes"],
            vocab=config["vocab_size"],
        )

    def run(self, prepared: Prepared, turn: Turn) -> Figures:
        """See `Peer.run`."""
        return take_turn(python("llama"), "llama_worker.py", prepared, turn, {})
