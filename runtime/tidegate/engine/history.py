"""`History`: which tokens a prompt and its answer hold, counted as they come; for the penalties.

Only requests with a penalty have one. It costs what the different tokens so far are, a few
thousand at most, and never the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tidegate.engine.executor import Tokens

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class History:
    """One moment. Both arrays have an entry per different token."""

    ids: Tokens = field(repr=False)
    """[U], each once."""
    generated: Counts = field(repr=False)
    """[U] how often the answer holds it; 0 for one that only the prompt does."""

    def after(self, token: int) -> History:
        """The history once `token` was chosen."""
        places = np.flatnonzero(self.ids == token)
        if len(places):
            generated = self.generated.copy()
            generated[places[0]] += 1
            return History(ids=self.ids, generated=generated)
        return History(
            ids=np.append(self.ids, np.int64(token)),
            generated=np.append(self.generated, np.int32(1)),
        )


class TokenCounter:
    """The history of a growing answer. What it gave out stays as it was."""

    def __init__(self, prompt: Tokens) -> None:
        """Begin with the prompt's tokens, or with none for penalties on the answer alone."""
        self._ids: Tokens = np.unique(prompt).astype(np.int64)
        self._generated: Counts = np.zeros(len(self._ids), np.int32)
        self._length = len(self._ids)
        self._place_of = {token: place for place, token in enumerate(self._ids.tolist())}

    def add(self, token: int) -> None:
        """Count one more token of the answer."""
        place = self._place_of.get(token)
        if place is None:
            place = self._place_of[token] = self._length
            self._length += 1
            if self._length > len(self._ids):
                self._grow()
            self._ids[place], self._generated[place] = token, 0
        self._generated[place] += 1

    def history(self) -> History:
        """The tokens so far; later ones do not change it."""
        # Ids are only ever appended, so a view does; counts go on changing.
        return History(
            ids=self._ids[: self._length], generated=self._generated[: self._length].copy()
        )

    def _grow(self) -> None:
        room = max(64, self._length)
        self._ids = np.concatenate((self._ids, np.zeros(room, np.int64)))
        self._generated = np.concatenate((self._generated, np.zeros(room, np.int32)))
