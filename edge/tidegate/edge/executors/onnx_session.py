"""Opens an ONNX graph: which file for which KV precision, session options, and what it must have.

Memory of the wrong shape or type, once bound, would be read and written past its end. So names,
types and shapes of a graph are held against the manifest's architecture before anything is bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tidegate.edge.executors.onnx_providers import Providers
from tidegate.errors import BundleError
from tidegate.model.architecture import Architecture

if TYPE_CHECKING:
    import onnxruntime

GRAPH, EXACT_GRAPH = "model.onnx", "model.exact.onnx"
"""The graph with int8 activations and the one with float32 activations, over the same weights."""

KvPrecision = Literal["float32", "float16", "int8"]

GRAPHS: Mapping[KvPrecision, str] = {
    "float32": GRAPH,
    "float16": "model.fp16.onnx",
    "int8": "model.int8kv.onnx",
}
"""A graph for each type of its KV; the float16 one computes in float16 too."""

FATAL_ONLY = 4
"""Log severity: errors arrive as exceptions, so stderr need not have them too."""

_ELEMENT_TYPES: Mapping[KvPrecision, str] = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
}
_STEP_INPUTS = {
    "input_ids": "tensor(int64)",
    "seqlens_k": "tensor(int32)",
    "total_sequence_length": "tensor(int32)",
    "sampled": "tensor(int64)",
}


def open_session(
    path: Path,
    *,
    threads: int | None,
    spinning: bool = False,
    providers: Providers | None = None,
) -> onnxruntime.InferenceSession:
    """Load a graph; arguments as in `OnnxSettings`, the CPU without `providers`.

    Raises:
        BundleError: it is not there or cannot be loaded.
        ConfigError: a provider is not available.
    """
    import onnxruntime

    wanted = (providers or Providers()).for_session(onnxruntime.get_available_providers())
    if not path.is_file():
        raise BundleError(f"{path}: is missing: convert with --graphs to have it")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = threads or 0
    # It remembers a memory plan for every shape it meets, and chunks come in any length.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:
        raise BundleError(f"{path}: ONNX Runtime cannot load it: {error}") from error


def check_signature(
    path: Path, session: onnxruntime.InferenceSession, arch: Architecture, kv: KvPrecision
) -> None:
    """Raise `BundleError` unless a decoder's graph is of this architecture and KV precision."""
    inputs = {item.name: (item.type, list(item.shape)) for item in session.get_inputs()}
    outputs = {item.name: (item.type, list(item.shape)) for item in session.get_outputs()}
    past = {name: inputs.pop(name) for name in list(inputs) if name.startswith("past_")}
    expected = {f"past_{kind}.{layer}" for layer in range(arch.layers) for kind in ("key", "value")}
    logits_type, logits_shape = outputs.get("logits", ("", []))
    fits = (
        past.keys() == expected
        and all(_is_cache(kind, shape, arch, kv) for kind, shape in past.values())
        and all(past[name] == past[_key_of(name)] for name in past)
        and all(past[name] == outputs.get(name.replace("past_", "present_")) for name in past)
        and {name: kind for name, (kind, _) in inputs.items()} == _STEP_INPUTS
        and (logits_type, logits_shape[1:]) == ("tensor(float)", [arch.vocab])
    )
    if not fits:
        raise BundleError(f"{path}: its inputs are not those of the manifest's architecture")


def head_sizes(session: onnxruntime.InferenceSession, arch: Architecture) -> list[int]:
    """Values that each layer of a checked graph keeps of a head."""
    shapes = {item.name: item.shape for item in session.get_inputs()}
    return [int(shapes[f"past_key.{layer}"][3]) for layer in range(arch.layers)]


def _key_of(past: str) -> str:
    return past.replace("past_value", "past_key")


def _is_cache(kind: str, shape: Sequence[object], arch: Architecture, kv: KvPrecision) -> bool:
    """Whether a cache has the model's heads, filled up by less than a multiple of 16."""
    match shape:
        case [_, heads, _, int(size)]:
            fits = heads == arch.kv_heads and arch.head_size <= size < arch.head_size + 16
            return fits and kind == _ELEMENT_TYPES[kv]
        case _:
            return False
