"""Tiny random encoders, and exported graphs run as they are, without an executor around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
import openvino
from checkpoints import byte_tokenizer

from tidegate.converters.onnx.encoder_ops import export_onnx_encoder
from tidegate.converters.openvino.encoder_ops import export_openvino_encoder
from tidegate.model.bundle import Bundle, BundleWriter
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.manifest import DEVICE_TARGETS, Manifest, MemoryNeed, Target
from tidegate.model.packed import Array
from tidegate.model.recipe import Recipe
from tidegate.model.walk import Weights

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]
"""Token ids [B, S] and lengths [B]."""

Graph = Callable[[Batch], Array]

Activations = Literal["exact", "int8"]

TINY = EncoderArchitecture(
    model_type="bert",
    layers=2,
    width=64,
    heads=4,
    inner=96,
    vocab=203,
    context=40,
    norm_eps=1e-12,
    activation="gelu",
    token_types=2,
    pooling="mean",
    normalised=True,
)
"""An embedding; an MLP that is no multiple of the largest group."""

CLASSIFIER = replace(
    TINY, pooling="cls", normalised=False, pooler="tanh", labels=("no", "maybe", "yes")
)
DISTILLED = replace(CLASSIFIER, token_types=0, pooler="relu", activation="gelu_tanh")
LINEAR = replace(TINY, pooling="cls", normalised=False, activation="relu")


def padded(texts: list[list[int]], *, width: int = 0, filler: int = 0) -> Batch:
    """Texts side by side, filled up to the longest or to `width`."""
    longest = max(width, *map(len, texts))
    ids = np.full((len(texts), longest), filler, np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return ids, np.array([len(text) for text in texts], np.int32)


def export_encoder(
    target: Target, arch: EncoderArchitecture, weights: Weights, folder: Path
) -> None:
    """Write one target's files to `folder`."""
    export = export_onnx_encoder if target == "onnx" else export_openvino_encoder
    export(arch, weights, folder)


def open_graph(target: Target, folder: Path, activations: Activations = "exact") -> Graph:
    """Load an exported graph on one thread."""
    return (_open_onnx if target == "onnx" else _open_openvino)(folder, activations)


def _open_onnx(folder: Path, activations: Activations) -> Graph:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    name = "model.exact.onnx" if activations == "exact" else "model.onnx"
    session = onnxruntime.InferenceSession(str(folder / name), options)

    def run(batch: Batch) -> Array:
        ids, lengths = batch
        result: Array = session.run(None, {"input_ids": ids, "lengths": lengths})[0]
        return result

    return run


def _open_openvino(folder: Path, activations: Activations) -> Graph:
    compiled = compile_openvino(folder, activations)

    def run(batch: Batch) -> Array:
        ids, lengths = batch
        inputs = {"input_ids": ids.astype(np.int32), "lengths": lengths}
        return np.array(compiled.create_infer_request().infer(inputs)[0])

    return run


def compile_openvino(folder: Path, activations: Activations = "exact") -> Any:
    """The compiled model, to run or to look at."""
    properties = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if activations == "exact" else 32,
        "INFERENCE_NUM_THREADS": 1,
    }
    return openvino.Core().compile_model(str(folder / "model.xml"), "CPU", properties)


def write_encoder_bundle(
    out: Path,
    arch: EncoderArchitecture,
    weights: Weights,
    *,
    targets: tuple[Target, ...] = DEVICE_TARGETS,
    context_tokens: int | None = None,
) -> Bundle:
    """A complete bundle around the exported graphs, without a checkpoint before it."""
    with BundleWriter(out) as writer:
        byte_tokenizer(arch.vocab).save(str(writer.folder / "tokenizer.json"))
        for target in targets:
            (writer.folder / target).mkdir()
            export_encoder(target, arch, weights, writer.folder / target)
        manifest = Manifest(
            model_id="tiny-encoder",
            version=1,
            architecture=arch,
            context_tokens=context_tokens or arch.context,
            recipe=Recipe(name="as it is", formats=(), passes=()),
            tensor_bits={},
            targets=targets,
            toolchain=dict.fromkeys(targets, "1"),
            memory=MemoryNeed(weight_bytes=0, kv_values_per_token=0),
            files=writer.entries(),
        )
        return writer.finish(manifest)
