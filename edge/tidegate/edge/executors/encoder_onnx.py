"""`OnnxEncoder`: an encoder's graph on ONNX Runtime; see `tidegate.converters.onnx.encoder_ops`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.edge.executors.encoder import Ids, Lengths
from tidegate.edge.executors.onnx_session import EXACT_GRAPH, GRAPH, open_session
from tidegate.errors import BundleError
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array

if TYPE_CHECKING:
    import onnxruntime


class OnnxEncoder:
    """`tidegate.edge.executors.encoder.EncoderGraph` over the `onnx/` folder of a bundle."""

    def __init__(
        self, folder: Path, arch: EncoderArchitecture, *, threads: int | None, exact: bool
    ) -> None:
        """Load the graph.

        Raises:
            BundleError: it cannot be loaded or is not of this architecture.
        """
        path = folder / (EXACT_GRAPH if exact else GRAPH)
        self._session: onnxruntime.InferenceSession | None = open_session(path, threads=threads)
        inputs = [item.name for item in self._session.get_inputs()]
        columns = [item.shape[1:] for item in self._session.get_outputs()]
        if inputs != ["input_ids", "lengths"] or columns != [[arch.outputs]]:
            raise BundleError(f"{path}: it is not a graph of the manifest's architecture")

    def run(self, ids: Ids, lengths: Lengths) -> Array:
        """See `EncoderGraph.run`."""
        assert self._session is not None, "closed"
        result: Array = self._session.run(None, {"input_ids": ids, "lengths": lengths})[0]
        return result

    def close(self) -> None:
        """See `EncoderGraph.close`."""
        self._session = None
