"""`TorchEncoder`: an encoder on torch, on a CPU beside the language model or on a CUDA device.

Float32 throughout. Weights are read from the checkpoint one at a time. On a CPU it keeps to threads
of its own, fewer than the cores, so that a batch of texts never stops what generates.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import torch

from tidegate.cloud.encoder_ops import BatchedEncoderOps, EncoderTensors
from tidegate.cloud.gpu_memory import MemoryPart, MemorySum
from tidegate.engine.text_batches import batches, check_texts
from tidegate.errors import ConfigError, ExecutionError
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array
from tidegate.model.roles import roles
from tidegate.model.walk import Weights, encoder

Device = Literal["auto", "cpu", "cuda"]

_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchEncoderSettings:
    """Sizes of one run, and where it runs.

    Raises:
        ConfigError: a value is out of range.
    """

    batch_rows: int = 32
    """Texts of one run."""
    batch_tokens: int = 2048
    """Tokens of one run, the longest text times the texts; one long text alone may have more."""
    threads: int | None = None
    """On a CPU; None for half of its cores: a language model runs beside."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("batch_rows", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError("threads", self.threads, "at least 1, or absent")
        if self.device not in get_args(Device):
            raise ConfigError("device", self.device, f"one of {', '.join(get_args(Device))}")


class TorchEncoder:
    """`tidegate.api.encoder_model.TextEncoder`."""

    def __init__(
        self, arch: EncoderArchitecture, weights: Weights, settings: TorchEncoderSettings
    ) -> None:
        """Read all weights of `arch`, which may then be closed, and run once.

        Raises:
            CheckpointError: a weight cannot be read.
            ConfigError: there is no such device.
        """
        self._arch, self._settings = arch, settings
        self.device = chosen_device(settings.device)
        self._tensors: EncoderTensors | None = EncoderTensors.load(arch, weights, self.device)
        self._threads = settings.threads or max(1, (os.cpu_count() or 1) // 2)
        self._ready: set[int] = set()
        """Threads that know how many of torch's they have."""
        self._run([[0]])
        if self.device.type == "cuda":  # memory reaches its peak now, not under load
            rows = max(1, min(settings.batch_rows, settings.batch_tokens // arch.context))
            self._run([[0] * arch.context] * rows)

    @property
    def arch(self) -> EncoderArchitecture:
        """See `TextEncoder.arch`."""
        return self._arch

    @property
    def context_tokens(self) -> int:
        """See `TextEncoder.context_tokens`."""
        return self._arch.context

    @property
    def nbytes(self) -> int:
        """Of the weights in memory."""
        return 0 if self._tensors is None else self._tensors.nbytes

    def encode(self, texts: Sequence[Sequence[int]]) -> Array:
        """See `TextEncoder.encode`; any number of texts, in as many runs as they need.

        Raises:
            RequestError: a text is empty, too long or has an unknown token.
            ExecutionError: torch failed, or it is closed.
        """
        check_texts(texts, context_tokens=self.context_tokens, vocab=self._arch.vocab)
        if self.device.type == "cpu" and threading.get_ident() not in self._ready:
            take_threads(self._threads)
            self._ready.add(threading.get_ident())
        result = np.empty((len(texts), self._arch.outputs), np.float32)
        lengths = [len(text) for text in texts]
        for batch in batches(lengths, self._settings.batch_rows, self._settings.batch_tokens):
            try:
                result[batch] = self._run([texts[number] for number in batch])
            except (RuntimeError, IndexError, ValueError) as error:
                where = f"{len(batch)} texts of up to {lengths[batch[0]]} tokens"
                raise ExecutionError(f"{where} failed: {error}") from error
        return result

    def close(self) -> None:
        """See `TextEncoder.close`."""
        self._tensors = None

    def _run(self, texts: Sequence[Sequence[int]]) -> Array:
        if self._tensors is None:
            raise ExecutionError("the encoder is closed")
        with torch.inference_mode():
            ops = BatchedEncoderOps(texts, self._tensors)
            found: Array = encoder(ops, self._arch, self._tensors).cpu().numpy()
        return found


def chosen_device(wanted: Device) -> torch.device:
    """Where it runs: a CUDA device where torch finds one, unless told otherwise.

    Raises:
        ConfigError: a CUDA device was asked for and there is none.
    """
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("device", wanted, "cpu or auto where torch finds no CUDA device")
    return torch.device("cuda" if found and wanted != "cpu" else "cpu")


def take_threads(count: int) -> None:
    """Give this thread `count` threads of torch's, and leave all others as they are.

    Torch's number belongs to the thread that sets it, but is what later threads begin with, too:
    one that only sets it back puts that right.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()


def encoder_memory(arch: EncoderArchitecture, settings: TorchEncoderSettings) -> MemorySum:
    """What a `TorchEncoder` takes at most, before it is loaded: its weights and its largest run."""
    values = sum(
        int(np.prod(role.shape)) + (role.shape[0] if role.bias else 0)
        for role in roles(arch).values()
    )
    tokens = max(settings.batch_tokens, arch.context)
    longest = min(arch.context, tokens)
    # At once: the residual stream, its sum and norm; q, k and v as they are, padded and mixed; the
    # MLP before and behind its non-linearity; scores and their softmax.
    run = tokens * (10 * arch.width + 2 * arch.inner) + 2 * arch.heads * tokens * longest
    return MemorySum(
        parts=(
            MemoryPart(name="weights, float32", nbytes=values * _FLOAT_BYTES),
            MemoryPart(name=f"a run of {tokens} tokens", nbytes=run * _FLOAT_BYTES),
        )
    )
