"""How far the residual stream of a bundle's ONNX graph is from the checkpoint's, layer by layer.

The graph's metadata name the tensor behind each layer, and the factor that the graph leaves out of
it (`onnx.ops.RESIDUAL`); they become outputs
of a copy in memory, which ONNX Runtime runs as a device would, on the bundle's own data file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from tidegate.converters.evaluation.page import LayerError
from tidegate.converters.evaluation.reference import reference_streams
from tidegate.converters.onnx.ops import EXACT_GRAPH, GRAPH, RESIDUAL
from tidegate.errors import ConversionError
from tidegate.model.architecture import Architecture
from tidegate.model.walk import Weights

Floats = npt.NDArray[np.float32]


def layer_errors(
    arch: Architecture,
    weights: Weights,
    folder: Path,
    sequences: Sequence[Sequence[int]],
    *,
    exact: bool = False,
) -> list[LayerError]:
    """Compare the streams of the graph in `folder` with those of the checkpoint's `weights`.

    The last layer is left out: only the rows that get logits leave it.

    Raises:
        ConversionError: the graph does not say where its streams are.
    """
    session, streams = _session(folder / (EXACT_GRAPH if exact else GRAPH), folder)
    layers = sorted(streams)
    names, factors = zip(*(streams[layer] for layer in layers), strict=True)
    sums = np.zeros((len(layers), 2))
    for sequence in sequences:
        found = session.run(list(names), _inputs(session, sequence))
        expected = reference_streams(arch, weights, sequence)
        for place, (right, got) in enumerate(zip(expected, found, strict=False)):
            difference = got.reshape(right.shape) * factors[place] - right
            sums[place] += np.square([difference, right], dtype=np.float64).sum(axis=(1, 2))
    errors = np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], 1e-30))
    return [
        LayerError(layer=layer, error=float(error))
        for layer, error in zip(layers, errors, strict=True)
    ]


def _session(
    path: Path, folder: Path
) -> tuple[onnxruntime.InferenceSession, dict[int, tuple[str, float]]]:
    """The graph with its streams as outputs, and their names and factors by layer."""
    model = onnx.load(path, load_external_data=False)
    streams: dict[int, tuple[str, float]] = {}
    for entry in model.metadata_props:
        if entry.key.startswith(RESIDUAL):
            name, factor = entry.value.split()
            streams[int(entry.key.removeprefix(RESIDUAL))] = (name, float(factor))
    if not streams:
        raise ConversionError(f"{path.name}: does not say where its residual streams are")
    for name, _ in streams.values():
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ), streams


def _inputs(
    session: onnxruntime.InferenceSession, sequence: Sequence[int]
) -> dict[str, npt.NDArray[np.generic]]:
    """One prefill of the whole sequence, with room for its KV."""
    length = len(sequence)
    values: dict[str, npt.NDArray[np.generic]] = {
        "input_ids": np.array([sequence], np.int64),
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "sampled": np.array([length - 1], np.int64),
    }
    for item in session.get_inputs():
        if item.name.startswith("past_"):
            kv_heads, head_size = item.shape[1], item.shape[3]
            values[item.name] = np.zeros((1, kv_heads, length, head_size), np.float32)
    return values
