"""Compresses with NNCF and gives the logits of what it made.

Runs in that peer's own environment, started by `quantisers.py`: exports with optimum-intel,
compresses with the same calibration text as ours, computes in float32 without rounding
activations, so only the weights count, and writes logits and bits a weight.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nncf
import numpy as np
import openvino
from optimum.intel import OVModelForCausalLM

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def inputs(tokens: list[int], names: set[str]) -> dict[str, np.ndarray]:
    """What the model takes for one sequence."""
    every = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
        "position_ids": np.arange(len(tokens))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return {name: values for name, values in every.items() if name in names}


def stored_bits(model: openvino.Model) -> int:
    """Of all tables and matrices: integers as they are, every float at 16 bits."""
    widths = {"u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "f32": 16, "bf16": 16}
    bits = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        kind, shape = node.get_output_element_type(0).get_type_name(), node.get_output_shape(0)
        # Scales end in a dimension of 1; norms and other small constants do not count anywhere.
        is_weight = kind in ("u4", "i4", "u8", "i8") or "scale" in node.get_friendly_name()
        is_table = len(shape) == 2 and min(shape) > 1 and kind in widths
        if (is_weight or is_table) and kind in widths:
            bits += widths[kind] * int(np.prod(shape))
    return bits


def main() -> None:
    """Arguments: checkpoint, a folder for everything, group size, and `awq`, `scale`, `gptq`."""
    checkpoint, folder, group_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    methods = sys.argv[4:]
    sequences = json.loads((folder / "sequences.json").read_text())
    exported = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, load_in_8bit=False, compile=False, stateful=False, use_cache=False
    )
    names = {one.get_any_name() for one in exported.model.inputs}
    samples = [inputs(tokens, names) for tokens in sequences["calibration"]]
    model = exported.model
    if group_size:
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=group_size,
            ratio=1.0,
            dataset=nncf.Dataset(samples),
            subset_size=len(samples),
            awq="awq" in methods,
            scale_estimation="scale" in methods,
            gptq="gptq" in methods,
        )
    compiled = openvino.Core().compile_model(model, "CPU", EXACT)
    found = [compiled(inputs(tokens, names))["logits"][0] for tokens in sequences["test"]]
    np.save(folder / "logits.npy", np.concatenate(found).astype(np.float32))
    (folder / "bits.json").write_text(json.dumps(stored_bits(model)))


if __name__ == "__main__":
    main()
