"""`EncoderExecutor`: token ids of texts in, one float32 vector per text out.

Texts of similar length share a run of the graph, so that little of it is padding. What a batch
may hold is bounded in texts and in tokens with the padding, and memory follows from that bound: the
largest batch is run once at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tidegate.edge.executors.choice import Choice, choose_target
from tidegate.edge.executors.settings import check_counts
from tidegate.engine.text_batches import batches, check_texts
from tidegate.errors import BundleError, ConfigError, ExecutionError
from tidegate.model.bundle import Bundle
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array

Ids = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSettings:
    """How an encoder runs on either runtime."""

    choice: Choice = "auto"
    context_tokens: int | None = None
    """Tokens of the longest text; the bundle's own limit when None."""
    batch_rows: int = 32
    """Texts of one run."""
    batch_tokens: int = 2048
    """Tokens of one run, padding included; one long text alone may have more."""
    threads: int | None = None
    """None leaves the number to the runtime, which takes the physical cores."""
    exact: bool = False
    """Float activations, for comparing; about twice as slow."""

    def __post_init__(self) -> None:
        check_counts(
            self, always=("batch_rows", "batch_tokens"), optional=("context_tokens", "threads")
        )


class EncoderGraph(Protocol):
    """A loaded graph of one target."""

    def run(self, ids: Ids, lengths: Lengths) -> Array:
        """Outputs [B, outputs] for token ids [B, S], padded on the right, and lengths [B]."""

    def close(self) -> None:
        """Let go of the model."""


class EncoderExecutor:
    """Runs an encoder's graph over any number of texts; for one thread at a time."""

    def __init__(
        self, graph: EncoderGraph, arch: EncoderArchitecture, settings: EncoderSettings
    ) -> None:
        """Run the largest batches once, so that memory has reached its peak.

        Args:
            graph: the loaded model.
            arch: what the bundle's manifest says of it.
            settings: with `context_tokens`, which must not be more than the model's.
        """
        self.context_tokens = settings.context_tokens or arch.context
        """Tokens that a text may have."""
        self._graph: EncoderGraph | None = graph
        self._arch, self._settings = arch, settings
        longest = max(settings.batch_tokens // self.context_tokens, 1)
        rows = min(settings.batch_rows, settings.batch_tokens)
        self.encode([[0] * self.context_tokens] * min(longest, settings.batch_rows))
        self.encode([[0] * min(settings.batch_tokens // rows, self.context_tokens)] * rows)

    @property
    def arch(self) -> EncoderArchitecture:
        """The model; its `labels` name the outputs of a classifier."""
        return self._arch

    def encode(self, texts: Sequence[Sequence[int]]) -> Array:
        """Embeddings or logits [texts, outputs], in the order of the texts.

        Args:
            texts: token ids, special ones such as [CLS] included. Nothing is cut off: what to do
                with a text that is too long is for the caller to say.

        Raises:
            RequestError: a text is empty, longer than `context_tokens` or has an unknown token.
            ExecutionError: the runtime failed, or the executor is closed.
        """
        # Compared before they are arrays: a number may be beyond an int64.
        check_texts(texts, context_tokens=self.context_tokens, vocab=self._arch.vocab)
        checked = [np.array(text, np.int64) for text in texts]
        lengths = [len(text) for text in checked]
        result = np.empty((len(checked), self._arch.outputs), np.float32)
        for batch in batches(lengths, self._settings.batch_rows, self._settings.batch_tokens):
            result[batch] = self._run([checked[number] for number in batch])
        return result

    def close(self) -> None:
        """Let go of the model; encoding is an error from then on."""
        if self._graph is not None:
            self._graph.close()
        self._graph = None

    def _run(self, texts: Sequence[Ids]) -> Array:
        if self._graph is None:
            raise ExecutionError("the executor is closed")
        lengths = np.array([len(text) for text in texts], np.int32)
        ids = np.zeros((len(texts), lengths.max()), np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        try:
            return self._graph.run(ids, lengths)
        except Exception as error:
            where = f"{len(texts)} texts of up to {lengths.max()} tokens"
            raise ExecutionError(f"{where}: {error}") from error


def open_encoder(bundle: Bundle, settings: EncoderSettings) -> EncoderExecutor:
    """Load the encoder of a bundle, which `Bundle.open` has verified.

    Raises:
        BundleError: the bundle is no encoder's, was not converted for the wanted target, or its
            graph cannot be loaded.
        ConfigError: the context is longer than the bundle's.
    """
    arch, longest = bundle.manifest.architecture, bundle.manifest.context_tokens
    if not isinstance(arch, EncoderArchitecture):
        raise BundleError(
            f"{bundle.manifest.model_id}: is a decoder ({arch.model_type}): it makes text and no "
            "embeddings"
        )
    context = settings.context_tokens or longest
    if context > longest:
        raise ConfigError("context_tokens", context, f"at most the bundle's {longest}")
    return EncoderExecutor(
        _open(bundle, arch, settings), arch, replace(settings, context_tokens=context)
    )


def _open(bundle: Bundle, arch: EncoderArchitecture, settings: EncoderSettings) -> EncoderGraph:
    target = choose_target(bundle, settings.choice)
    folder = bundle.target_folder(target)
    # Imported here: a device installs only the runtime it uses.
    if target == "openvino":
        from tidegate.edge.executors.encoder_openvino import OpenVinoEncoder

        return OpenVinoEncoder(folder, arch, threads=settings.threads, exact=settings.exact)
    from tidegate.edge.executors.encoder_onnx import OnnxEncoder

    return OnnxEncoder(folder, arch, threads=settings.threads, exact=settings.exact)
