"""onnxruntime-genai as a peer: its builder's int4 for the CPU, its generator."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from peers.contract import Figures, Prepared, Turn
from peers.environments import problem, python
from peers.process import once, take_turn
from peers.step_bytes import onnx_step_bytes


@dataclass(frozen=True, kw_only=True)
class OrtGenai:
    """See `Peer`."""

    name: str
    block_size: int
    streams: tuple[int, ...] | None

    @property
    def settings(self) -> str:
        """See `Peer.settings`."""
        return (
            f"its builder's int4, groups of {self.block_size}, accuracy level 4 (its default);"
            " KV shared between steps; a batch starts and ends together"
        )

    def missing(self) -> str | None:
        """See `Peer.missing`."""
        return problem("genai")

    def prepare(self, checkpoint: Path, work: Path) -> Prepared:
        """See `Peer.prepare`."""
        model = work / f"genai-{self.block_size}"
        cache = work / f"genai-{self.block_size}.cache"
        tool = [str(python("genai")), "-m", "onnxruntime_genai.models.builder"]
        paths = ["-i", str(checkpoint), "-o", "{out}", "-c", str(cache)]
        group = ["--extra_options", f"block_size={self.block_size}"]
        once(model, [*tool, "-p", "int4", "-e", "cpu", *paths, *group])
        shutil.rmtree(cache, ignore_errors=True)
        return Prepared(
            model=model,
            weight_bytes=(model / "model.onnx.data").stat().st_size,
            step_bytes=onnx_step_bytes(model / "model.onnx"),
            vocab=json.loads((checkpoint / "config.json").read_text())["vocab_size"],
        )

    def run(self, prepared: Prepared, turn: Turn) -> Figures:
        """See `Peer.run`. Threads are a matter of the model's own config.

        Its builder takes the end's id from the class of tokenizer that it thinks fits the model,
        which for random weights may lie beyond the vocabulary.
        """
        path = prepared.model / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = turn.threads
        config["model"] |= {"bos_token_id": 0, "eos_token_id": [1], "pad_token_id": 1}
        path.write_text(json.dumps(config, indent=2))
        return take_turn(python("genai"), "genai_worker.py", prepared, turn, {})
