"""Converts with onnxruntime-genai's builder and gives the logits of what it made.

Runs in that peer's own environment, started by `quantisers.py`: reads token sequences, builds,
computes in float32 (accuracy level 1, so only the weights count), writes logits and bits a weight.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


def build(checkpoint: Path, out: Path, options: list[str]) -> Path:
    """Run the builder for the CPU; the ONNX file."""
    tool = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    paths = ["-i", str(checkpoint), "-o", str(out), "-c", str(out / "cache")]
    extra = ["--extra_options", "accuracy_level=1", *options]
    subprocess.run([*tool, *paths, *extra], check=True, stdout=sys.stderr)
    return out / "model.onnx"


def stored_bits(path: Path) -> int:
    """Of all tables and matrices: integers as they are, every float at 16 bits."""
    bits = 0
    for tensor in onnx.load(str(path)).graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        caches = "cos_cache" in tensor.name or "sin_cache" in tensor.name
        if values.dtype == np.uint8:
            bits += values.nbytes * 8
        elif values.dtype.kind == "f" and not caches and "norm" not in tensor.name:
            bits += values.size * 16
    return bits


def logits(path: Path, sequences: list[list[int]], cache: tuple[int, int]) -> np.ndarray:
    """Of every token of every sequence, [tokens, V]; `cache` is (kv heads, head size)."""
    kv_heads, head_size = cache
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for tokens in sequences:
        feed: dict[str, np.ndarray] = {}
        for one in session.get_inputs():
            if one.name == "input_ids":
                feed[one.name] = np.array([tokens], np.int64)
            elif one.name == "attention_mask":
                feed[one.name] = np.ones((1, len(tokens)), np.int64)
            elif one.name == "position_ids":
                feed[one.name] = np.arange(len(tokens))[None]
            else:
                feed[one.name] = np.zeros((1, kv_heads, 0, head_size), np.float32)
        found.append(session.run(["logits"], feed)[0][0])
    return np.concatenate(found).astype(np.float32)


def main() -> None:
    """Arguments: checkpoint, a folder for everything, and the builder's extra options."""
    checkpoint, folder, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sequences = json.loads((folder / "sequences.json").read_text())
    path = build(checkpoint, folder / "built", options)
    config = json.loads((checkpoint / "config.json").read_text())
    cache = (config["num_key_value_heads"], config["head_dim"])
    np.save(folder / "logits.npy", logits(path, sequences["test"], cache))
    (folder / "bits.json").write_text(json.dumps(stored_bits(path)))


if __name__ == "__main__":
    main()
