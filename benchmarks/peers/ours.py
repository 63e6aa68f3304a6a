"""Ours beside its peers: one bundle with both targets, made by the command that people use."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import openvino
from converters.synthetic import SHAPES, write_checkpoint
from peers.contract import Figures, Prepared, Turn
from peers.process import once, take_turn
from peers.step_bytes import onnx_step_bytes, openvino_step_bytes

from tidegate.edge.executors.choice import Choice
from tidegate.edge.executors.native import NativeUnavailable, find_native

GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Tidegate:
    """See `Peer`."""

    name: str
    choice: Choice
    native: Literal["on", "off"] | None
    """Whether our own 4-bit linear runs; None for what the daemon does, or on ONNX Runtime."""
    streams: tuple[int, ...] | None = None
    through: Literal["executor", "engine"] = "executor"
    """What decodes: a plain loop over the executor, or the engine, which schedules and streams."""

    @property
    def settings(self) -> str:
        """See `Peer.settings`."""
        linear = {"on": ", native 4-bit linear", "off": ", the library's operators", None: ""}
        return f"4 bits, groups of 64, tables 8 bits; {self.choice}{linear[self.native]}"

    def missing(self) -> str | None:
        """See `Peer.missing`."""
        return native_problem() if self.native == "on" else None

    def prepare(self, checkpoint: Path, work: Path) -> Prepared:
        """See `Peer.prepare`."""
        model = prepare_bundle(checkpoint, work)
        manifest = json.loads((model / "manifest.json").read_text())
        if self.choice == "openvino":
            step_bytes = openvino_step_bytes(model / "openvino" / "model.xml")
        else:
            step_bytes = onnx_step_bytes(model / "onnx" / "model.onnx")
        return Prepared(
            model=model,
            weight_bytes=manifest["memory"]["weight_bytes"],
            step_bytes=step_bytes,
            vocab=json.loads((checkpoint / "config.json").read_text())["vocab_size"],
        )

    def run(self, prepared: Prepared, turn: Turn) -> Figures:
        """See `Peer.run`."""
        options = {"choice": self.choice, "native": self.native, "through": self.through}
        return take_turn(Path(sys.executable), "tidegate_worker.py", prepared, turn, options)


def checkpoint_of(shape: str, work: Path) -> Path:
    """Random weights in the shape, written once; a broken one is written anew."""
    checkpoint = work / "checkpoint"
    if not (checkpoint / "tokenizer.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(checkpoint, SHAPES[shape])
    return checkpoint


def prepare_bundle(checkpoint: Path, work: Path) -> Path:
    """Convert the checkpoint for both executors, once."""
    tool = [sys.executable, "-P", "-m", "tidegate.cli", "convert", str(checkpoint)]
    flags = ["--target", "onnx,openvino", "--bits", "4", "--group-size", str(GROUP_SIZE)]
    once(work / "tidegate", [*tool, "--out", "{out}", *flags, "--quiet"])
    return work / "tidegate"


def native_problem() -> str | None:
    """Why the native linear does not run here, in its own words; None when it does."""
    try:
        find_native(openvino.__version__.partition("-")[0])
    except NativeUnavailable as error:
        return str(error)
    return None
