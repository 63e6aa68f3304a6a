"""`Encoders`: the models beside the one that generates, as an HTTP surface serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.api.backend import ModelCard, Route
from tidegate.api.classify import Classifier
from tidegate.api.embeddings import Embedder
from tidegate.api.encoder_metrics import EncoderMetrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """What answers `/v1/embeddings` and `/classify`; calls that name no model get the first."""

    embedders: Sequence[Embedder] = ()
    classifiers: Sequence[Classifier] = ()
    route: Route = "edge"
    metrics: EncoderMetrics | None = None
    """Shown at `/metrics`."""

    def cards(self) -> tuple[ModelCard, ...]:
        """The entries of `/v1/models`, embedders first."""
        found = [one.card for one in self.embedders]
        return (*found, *(one.card for one in self.classifiers))

    def render(self) -> bytes:
        """Prometheus text exposition."""
        return b"" if self.metrics is None else self.metrics.render()


NONE: Final = Encoders()
"""Of a service without encoders."""
