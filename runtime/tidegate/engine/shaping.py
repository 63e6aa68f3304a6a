"""`shaped`: a row's logits as a request wants them, before one of them is chosen.

In this order, which is vLLM's: logit bias, then the repetition penalty (CTRL, Keskar et al. 2019)
over prompt and answer, then frequency and presence penalties over the answer, then what may not be
chosen: tokens outside a grammar's mask, and the ends of an answer that is still too short. Where
the grammar allows nothing but an end, the grammar wins.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt

from tidegate.engine.executor import Logits
from tidegate.engine.history import History
from tidegate.engine.request import SamplingParams

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One row's wish: how to choose, and `position`, the tokens before the one to choose.

    Complete: the same draw over the same logits chooses the same token.
    """

    params: SamplingParams
    seed: int
    position: int
    allowed: npt.NDArray[np.uint32] | None = field(default=None, repr=False)
    """Tokens that may be chosen, bit `t % 32` of word `t // 32`; None for all."""
    history: History | None = None
    """The tokens before `position`; needed when `params.penalises`."""
    ends: tuple[int, ...] = ()
    """Tokens that may not be chosen before position `ends_from`."""
    ends_from: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the logits are taken as the model gave them."""
        return (
            self.allowed is None
            and self.history is None
            and not self.ends
            and not self.params.logit_bias
        )

    def after(self, token: int) -> Draw:
        """The draw of the next position, once `token` was chosen here."""
        history = None if self.history is None else self.history.after(token)
        return replace(self, position=self.position + 1, allowed=None, history=history)


def shaped(logits: Logits, draw: Draw) -> Logits:
    """A copy of the logits [V] with everything in it that `draw` asks for."""
    row: Logits = logits.copy()
    if draw.params.logit_bias:
        ids, biases = _bias_arrays(draw.params.logit_bias)
        row[ids] += biases
    if draw.params.penalises:
        assert draw.history is not None, "who penalises brings the tokens so far"
        _penalise(row, draw.params, draw.history)
    barred = draw.ends if draw.position < draw.ends_from else ()
    if draw.allowed is not None:
        _mask(row, draw.allowed)
    return _barred(row, np.array(barred, np.int64)) if barred else row


def _penalise(row: Logits, params: SamplingParams, history: History) -> None:
    values = row[history.ids].astype(np.float64)
    if params.repetition_penalty != 1:
        factor = params.repetition_penalty
        values = np.where(values > 0, values / factor, values * factor)
    if params.penalises_answer:
        values -= params.frequency_penalty * history.generated
        values -= params.presence_penalty * (history.generated > 0)
    row[history.ids] = values


def _mask(row: Logits, allowed: npt.NDArray[np.uint32]) -> None:
    # Adding zeros and infinities, eight at a time, takes a tenth of selecting by single bits.
    row += _terms()[allowed.view(np.uint8)].reshape(-1)[: len(row)]


@cache
def _terms() -> npt.NDArray[np.float32]:
    """[256, 8] what a byte of a mask adds to eight logits: 0 for a set bit, else minus infinity."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, np.float32(0), np.float32(-np.inf))


def _barred(row: Logits, ends: _Ids) -> Logits:
    """Without `ends`, unless nothing else is left."""
    kept = row[ends]
    row[ends] = -np.inf
    if row.max() == -np.inf:
        row[ends] = kept
    return row


@lru_cache(maxsize=64)
def _bias_arrays(bias: tuple[tuple[int, float], ...]) -> tuple[_Ids, npt.NDArray[np.float32]]:
    """Once for a request, not once for each of its steps."""
    ids = np.array([token for token, _ in bias], np.int64)
    return ids, np.array([value for _, value in bias], np.float32)
