"""`OpenVinoEncoder`: an encoder's graph on OpenVINO.

The graph is described in `tidegate.converters.openvino.encoder_ops`. It holds public operations
only, so unlike a decoder's it is not tied to a version.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tidegate.edge.executors.encoder import Ids, Lengths
from tidegate.edge.executors.openvino_model import Library, cpu_properties
from tidegate.errors import BundleError
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array


class OpenVinoEncoder:
    """`tidegate.edge.executors.encoder.EncoderGraph` over the `openvino/` folder of a bundle."""

    def __init__(
        self, folder: Path, arch: EncoderArchitecture, *, threads: int | None, exact: bool
    ) -> None:
        """Load and compile the graph.

        Raises:
            BundleError: it cannot be loaded or is not of this architecture.
        """
        import openvino

        path, core = folder / "model.xml", openvino.Core()
        try:
            model = core.read_model(path)
            properties = cpu_properties(model, threads=threads, exact=exact)
            compiled = core.compile_model(model, "CPU", properties)
        except Exception as error:
            raise BundleError(f"{path}: OpenVINO cannot load it: {error}") from error
        inputs = {item.get_any_name() for item in compiled.inputs}
        columns = [item.get_partial_shape()[1] for item in compiled.outputs]
        if inputs != {"input_ids", "lengths"} or columns != [arch.outputs]:
            raise BundleError(f"{path}: it is not a graph of the manifest's architecture")
        self._request: Library | None = compiled.create_infer_request()

    def run(self, ids: Ids, lengths: Lengths) -> Array:
        """See `EncoderGraph.run`."""
        assert self._request is not None, "closed"
        self._request.infer({"input_ids": ids.astype(np.int32), "lengths": lengths})
        return np.array(self._request.get_output_tensor().data, np.float32)

    def close(self) -> None:
        """See `EncoderGraph.close`."""
        self._request = None
