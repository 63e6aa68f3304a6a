"""OpenVINO GenAI as a peer: optimum-intel's export at 4 bits, its continuous-batching pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peers.contract import Figures, Prepared, Turn
from peers.environments import problem, python
from peers.process import once, take_turn
from peers.step_bytes import openvino_step_bytes

GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class OpenVinoGenai:
    """See `Peer`."""

    name: str
    pipeline: Literal["batching", "plain"] = "batching"
    """`plain` is LLMPipeline on the stateful model, for one stream."""

    @property
    def streams(self) -> tuple[int, ...] | None:
        """See `Peer.streams`."""
        return (1,) if self.pipeline == "plain" else None

    @property
    def settings(self) -> str:
        """See `Peer.settings`."""
        kind = {
            "batching": "ContinuousBatchingPipeline, steps of 2048 tokens",
            "plain": "LLMPipeline, stateful",
        }[self.pipeline]
        return (
            f"optimum-intel int4, groups of 64, tables 8 bits; {kind}, KV u8, latency hint,"
            " activations quantised in groups of 64"
        )

    def missing(self) -> str | None:
        """See `Peer.missing`."""
        return problem("ovgenai") or problem("optimum")

    def prepare(self, checkpoint: Path, work: Path) -> Prepared:
        """See `Peer.prepare`."""
        model = work / "ovgenai"
        tool = [str(python("optimum")), "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        kind = ["--task", "text-generation-with-past", "--weight-format", "int4", "--ratio", "1.0"]
        group = ["--group-size", str(GROUP_SIZE)]
        once(model, [*tool, "-m", str(checkpoint), *kind, *group, "{out}"])
        return Prepared(
            model=model,
            weight_bytes=(model / "openvino_model.bin").stat().st_size,
            step_bytes=openvino_step_bytes(model / "openvino_model.xml"),
            vocab=json.loads((checkpoint / "config.json").read_text())["vocab_size"],
        )

    def run(self, prepared: Prepared, turn: Turn) -> Figures:
        """See `Peer.run`."""
        options = {"dynamic_quantization": GROUP_SIZE, "pipeline": self.pipeline}
        return take_turn(python("ovgenai"), "openvino_worker.py", prepared, turn, options)
