"""The engines that take turns, each with the best settings that its documentation advises.

Ours runs three times: OpenVINO with its native 4-bit linear, OpenVINO alone, and ONNX Runtime.
Every peer's module is a `Peer`; this one lists them.
"""

from __future__ import annotations

from collections.abc import Sequence

from peers.contract import Peer
from peers.llamacpp import LlamaCpp
from peers.openvinogenai import OpenVinoGenai
from peers.ortgenai import OrtGenai
from peers.ours import Tidegate

LLAMA, OPENVINO = "llama.cpp", "OpenVINO GenAI"
OPENVINO_PLAIN = "OpenVINO GenAI LLMPipeline"
GENAI_32, GENAI_64 = "onnxruntime-genai g32", "onnxruntime-genai g64"
NATIVE, LIBRARY, ONNX = "tidegate openvino+native", "tidegate openvino", "tidegate onnx"


def every_engine(parts: Sequence[str] | None = None) -> list[Peer]:
    """In the order they take turns; with `parts`, those whose name holds one of them."""
    engines: list[Peer] = [
        Tidegate(name=NATIVE, choice="openvino", native="on"),
        LlamaCpp(name=LLAMA),
        Tidegate(name=LIBRARY, choice="openvino", native="off"),
        OpenVinoGenai(name=OPENVINO),
        OpenVinoGenai(name=OPENVINO_PLAIN, pipeline="plain"),
        Tidegate(name=ONNX, choice="onnx", native=None),
        # Its prompts take long and no bar is about its batches: one number of streams is enough.
        OrtGenai(name=GENAI_32, block_size=32, streams=(1, 4)),
        OrtGenai(name=GENAI_64, block_size=64, streams=(1,)),
    ]
    return [one for one in engines if parts is None or any(part in one.name for part in parts)]
