"""The torch reference behind the shape of an executor, for tests that compare one with it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.executor import ExecutorStep, Logits
from tidegate.kernels.torch_ops import TorchKv, TorchOps, TorchRow, WeightTensors
from tidegate.model.architecture import Architecture
from tidegate.model.walk import Weights, decoder

KvRows = npt.NDArray[np.float32]


class TorchReference:
    """Runs steps over slots in float32 on the very integers an executor has."""

    def __init__(self, arch: Architecture, weights: Weights, *, slots: int, tokens: int) -> None:
        # Threads cost more than they give on matrices of this size.
        torch.set_num_threads(1)
        self._arch, self._weights, self._tensors = arch, weights, WeightTensors()
        self._kv = TorchKv.allocate(
            layers=arch.layers,
            slots=slots,
            tokens=tokens,
            kv_heads=arch.kv_heads,
            head_size=arch.head_size,
        )

    def execute(self, step: ExecutorStep) -> Logits:
        """The logits that rows want, [sum of them, V]."""
        for source, target, tokens in step.copies:
            for buffer in (*self._kv.keys, *self._kv.values):
                buffer[target, :tokens] = buffer[source, :tokens].clone()
        rows = [
            TorchRow(
                tokens=tuple(row.tokens.tolist()),
                past=row.past,
                slot=row.slot or 0,
                logits=row.logits,
            )
            for row in step.rows
        ]
        with torch.inference_mode():
            ops = TorchOps(rows, self._kv, self._tensors)
            logits: Logits = decoder(ops, self._arch, self._weights).numpy()
        return logits

    def keys(self, layer: int) -> KvRows:
        """What is kept of a layer's keys, [slots, tokens, K, H]."""
        return self._kv.keys[layer].numpy()

    def values(self, layer: int) -> KvRows:
        """What is kept of a layer's values, [slots, tokens, K, H]."""
        return self._kv.values[layer].numpy()
