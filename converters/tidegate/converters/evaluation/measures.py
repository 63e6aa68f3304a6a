"""Compares a model's next-token distributions with a reference's, position by position.

Perplexity alone hides damage: a model can gain on one token what it loses on another. So mean and
99th percentile of the KL divergence and the agreement of the best token are kept beside it.
Everything is a sum over positions, so texts of any length are measured a sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidegate.model.quality import ConfidenceBin

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

MARGINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Edges of the confidence table, in logits: below 0.5 rounding decides, above 4 hardly anything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """Measures of every position of one or more sequences, [n] each."""

    kl: Floats
    """Nats, reference to found."""
    loss: Floats
    """Negative log-likelihood of the next token, where there is one."""
    reference_loss: Floats
    agree: npt.NDArray[np.bool_]
    """The best token is the reference's."""
    margin: Floats
    """Gap between the two best logits that were found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Measures over all positions."""

    positions: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    agreement: float
    confidence: tuple[ConfidenceBin, ...]


def compare(
    reference: Logits, found: Logits, following: Sequence[int] | npt.NDArray[np.int64]
) -> Positions:
    """Compare logits [T, V] of one sequence.

    Args:
        reference: of the model that is right by definition.
        found: of the model that is measured.
        following: the token that comes after each position, [T] or [T - 1].
    """
    expected, got = _log_softmax(reference), _log_softmax(found)
    targets = np.asarray(following, np.int64)
    rows = np.arange(len(targets))
    best = np.partition(found, -2, axis=-1)[:, -2:].astype(np.float64)
    return Positions(
        kl=np.maximum((np.exp(expected) * (expected - got)).sum(axis=-1), 0.0),
        loss=-got[rows, targets],
        reference_loss=-expected[rows, targets],
        agree=reference.argmax(axis=-1) == found.argmax(axis=-1),
        margin=best[:, 1] - best[:, 0],
    )


def summarise(parts: Sequence[Positions]) -> Summary:
    """Measures over all positions of all sequences; `ValueError` when there is none."""
    if not parts or not sum(len(part.kl) for part in parts):
        raise ValueError("no position was measured")
    kl = np.concatenate([part.kl for part in parts])
    agree = np.concatenate([part.agree for part in parts])
    margin = np.concatenate([part.margin for part in parts])
    return Summary(
        positions=len(kl),
        perplexity=_perplexity([part.loss for part in parts]),
        reference_perplexity=_perplexity([part.reference_loss for part in parts]),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        agreement=float(agree.mean()),
        confidence=_confidence(margin, agree),
    )


def _confidence(margin: Floats, agree: npt.NDArray[np.bool_]) -> tuple[ConfidenceBin, ...]:
    """How often the best token is the reference's, by the gap to the second."""
    places = np.searchsorted(MARGINS, margin, side="right") - 1
    bins = []
    for place, edge in enumerate(MARGINS):
        inside = places == place
        share = float(inside.mean())
        right = float(agree[inside].mean()) if share else 0.0
        bins.append(ConfidenceBin(margin=edge, share=share, agreement=right))
    return tuple(bins)


def _perplexity(losses: Sequence[Floats]) -> float:
    """`exp` of the mean loss; infinite text-book values are cut where a float64 ends."""
    mean = float(np.concatenate(losses).mean()) if any(len(loss) for loss in losses) else 0.0
    return math.exp(min(mean, 700.0))


def _log_softmax(logits: Logits) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def cosine(reference: Logits, found: Logits) -> Floats:
    """Cosine of the angle between rows [n, width] of two sets of embeddings, [n]."""
    dot = (reference.astype(np.float64) * found).sum(axis=-1)
    lengths = np.linalg.norm(reference, axis=-1) * np.linalg.norm(found, axis=-1)
    result: Floats = dot / np.maximum(lengths, 1e-30)
    return result
