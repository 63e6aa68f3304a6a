"""`Encoders`: the models beside the one that generates, as an HTTP surface serves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.api.backend import Health, ModelCard, Route
from tidegate.api.classify import Classifier
from tidegate.api.embeddings import Embedder
from tidegate.api.encoder_metrics import EncoderMetrics

STALL_S: Final = 120.0
"""A run that takes longer is stuck: one of 2048 tokens takes seconds, and more of a large model."""


def _never_busy() -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """What answers `/v1/embeddings` and `/classify`; calls that name no model get the first."""

    embedders: Sequence[Embedder] = ()
    classifiers: Sequence[Classifier] = ()
    route: Route = "edge"
    metrics: EncoderMetrics | None = None
    """Shown at `/metrics`."""
    busy_s: Callable[[], float] = _never_busy
    """How long the longest of the present runs has taken so far."""

    def problem(self) -> str | None:
        """Why the service is not healthy, if it is their fault."""
        busy_s = self.busy_s()
        return f"an encoder's run has taken {busy_s:.0f} s so far" if busy_s > STALL_S else None

    def snapshot(self) -> Health:
        """For a watchdog, see `tidegate.api.lifecycle.Watched`."""
        problem = self.problem()
        return Health(healthy=problem is None, ready=True, detail=problem or "")

    def cards(self) -> tuple[ModelCard, ...]:
        """The entries of `/v1/models`, embedders first."""
        found = [one.card for one in self.embedders]
        return (*found, *(one.card for one in self.classifiers))

    def render(self) -> bytes:
        """Prometheus text exposition."""
        return b"" if self.metrics is None else self.metrics.render()


NONE: Final = Encoders()
"""Of a service without encoders."""
