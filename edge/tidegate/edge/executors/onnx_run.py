"""`OnnxRun`: a run of the graph over neighbouring buffer rows, bound to memory once.

What a step costs beside the library is Python's: binding the KV of 22 layers takes 0.3 ms, and so
it is done once for each place that requests are at. Inputs live in arrays of the run's own, which
a step only fills in; they are bound anew when their shape changes, as it does between chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tidegate.edge.executors.slots import SlotBuffers
from tidegate.engine.executor import Logits, Row

if TYPE_CHECKING:
    import onnxruntime

AnyArray = npt.NDArray[np.generic]


class OnnxRun:
    """Runs rows of equal token count whose KV lies in buffer rows `first`, `first + 1`, ..."""

    def __init__(
        self, session: onnxruntime.InferenceSession, kv: SlotBuffers, first: int, count: int
    ) -> None:
        """Bind the KV of `count` buffer rows, past and present to the same memory."""
        self._session, self._binding = session, session.io_binding()
        self._count = count
        for layer, buffers in enumerate(zip(kv.keys, kv.values, strict=True)):
            for kind, buffer in zip(("key", "value"), buffers, strict=True):
                view = buffer[first : first + count]
                _bind(self._binding.bind_input, f"past_{kind}.{layer}", view)
                _bind(self._binding.bind_output, f"present_{kind}.{layer}", view)
        self._inputs: dict[str, AnyArray] = {}
        self._tokens = self._input("input_ids", np.int64, (count, 1))
        self._lasts = self._input("seqlens_k", np.int32, (count,))
        self._total = self._input("total_sequence_length", np.int32, ())
        self._sampled = self._input("sampled", np.int64, (count,))

    def run(self, rows: Sequence[Row], sampled: Sequence[int], logits: Logits) -> None:
        """Run the rows, in the order of the buffer.

        Args:
            rows: as many as the run is for, with equally many tokens each.
            sampled: which tokens of all rows one after another get logits, in any order.
            logits: [len(sampled), V], contiguous; is written.
        """
        tokens = len(rows[0].tokens)
        assert len(rows) == self._count, "a run is for so many rows"
        assert len(sampled) == len(logits), "a place for each of the logits"
        if self._tokens.shape[1] != tokens:
            self._tokens = self._input("input_ids", np.int64, (self._count, tokens))
        if len(self._sampled) != len(sampled):
            self._sampled = self._input("sampled", np.int64, (len(sampled),))
        for place, row in enumerate(rows):
            self._tokens[place] = row.tokens
            self._lasts[place] = row.past + tokens - 1
        self._total[...] = self._lasts.max() + 1
        self._sampled[:] = sampled
        _bind(self._binding.bind_output, "logits", logits)
        self._session.run_with_iobinding(self._binding)

    def _input(
        self, name: str, kind: type[np.int32 | np.int64], shape: tuple[int, ...]
    ) -> npt.NDArray[np.int64]:
        """An array that the input `name` reads from; the run keeps it alive."""
        array: npt.NDArray[np.int64] = np.zeros(shape, kind)
        self._inputs[name] = array
        _bind(self._binding.bind_input, name, array)
        return array


def _bind(bind: Callable[..., None], name: str, array: AnyArray) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
