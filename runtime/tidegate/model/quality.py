"""`Quality`: what compression cost, measured against the checkpoint, as a manifest records it.

The source of each measure: perplexity and mean KL divergence over every position of the text;
agreement is how often the most likely token is the same. `ConfidenceBin`s tell a device how far
to trust one token of this bundle: by the gap between its two best logits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfidenceBin:
    """Positions whose two best logits differ by at least `margin` (and less than the next's)."""

    margin: float
    share: float
    """Of all positions."""
    agreement: float
    """How often the best token was the reference's best; 0 when the bin is empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A decoder's measures over one text, through the backend a device would use."""

    text: str
    """Name of the text."""
    text_sha256: str
    positions: int
    backend: str
    reference: str
    """What it was held against, such as `checkpoint in float32`."""
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    """Nats, reference to bundle."""
    kl_p99: float
    agreement: float
    """Share of positions with the same most likely token."""
    exact_match: float | None = None
    """Share of task answers that are right, where the text is a task."""
    reference_exact_match: float | None = None
    confidence: tuple[ConfidenceBin, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingQuality:
    """An encoder's measures over a list of sentences."""

    text: str
    text_sha256: str
    sentences: int
    backend: str
    reference: str
    cosine_mean: float
    cosine_min: float
