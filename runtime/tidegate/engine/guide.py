"""`GrammarGuide`: an answer's place in its grammar, as masks of the tokens that may come next.

The matcher (llguidance) works on bytes: any tokens that spell an allowed text are allowed, and the
ids that end an answer exactly when the text may end. What it accepted are the tokens that `choose`
chose, one by one, so a guess that failed, a step that failed or a preemption never has to be taken
back. Used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from llguidance import LLMatcher

from tidegate.engine.choosing import Mask
from tidegate.engine.executor import Tokens
from tidegate.errors import RequestError

_WORD_BITS: Final = 32
_REASON_CHARS: Final = 200


class GrammarGuide:
    """See `tidegate.engine.choosing.Guide`."""

    def __init__(self, matcher: LLMatcher, *, vocab: int, name: str = "constraint") -> None:
        """Guide by a matcher.

        Args:
            matcher: owned by this object.
            vocab: the model's, padding included.
            name: the field of the request that the grammar came from, for errors.
        """
        self._matcher = matcher
        self._name = name
        self._words: Mask = np.zeros(-(-vocab // _WORD_BITS), np.uint32)
        self._address = self._words.ctypes.data

    def mask(self) -> Mask:
        """See `Guide.mask`; valid until the next call.

        Raises:
            RequestError: the grammar is too complex to go on, or leaves no token to choose.
        """
        self._matcher.unsafe_compute_mask_ptr(self._address, self._words.nbytes)
        if self._matcher.is_error():
            raise self._stuck()
        if not self._words.any():
            raise RequestError(self._name, "the grammar allows no token that this model has")
        return self._words

    def accept(self, token: int) -> None:
        """See `Guide.accept`.

        Raises:
            RequestError: the grammar is too complex to go on, or never allowed `token`.
        """
        if not self._matcher.consume_token(token):
            raise self._stuck()

    def accept_some(self, tokens: Sequence[int]) -> int:
        """See `Guide.accept_some`. A token takes 4 us, its mask 15 us and up."""
        for place, token in enumerate(tokens):
            # The matcher would take parts of a token that it forces, which masks do not allow.
            forced = self._matcher.compute_ff_tokens()
            if forced and forced[0] != token:
                return place
            if not self._matcher.try_consume_tokens([token]):
                return place
        return len(tokens)

    def forced(self) -> Tokens:
        """See `Guide.forced`."""
        return np.array(self._matcher.compute_ff_tokens(), dtype=np.int64)

    def _stuck(self) -> RequestError:
        # The first line says what, the rest is the state of a parser.
        reason = (self._matcher.get_error().splitlines() or [""])[0][:_REASON_CHARS]
        return RequestError(self._name, f"the grammar cannot go on: {reason}")
