"""Prompt lookup: what followed the last time a request's text went like this.

Answers repeat their prompts and themselves: names, keys of JSON, quoted lines. The longest suffix
of two to five tokens that has occurred before is looked up, and what followed it then is the
guess (prompt lookup decoding, Saxena 2023). An index of a request's n-grams makes that O(1) a
token; it keeps hashes, since a rare wrong guess costs a step's spare time and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.engine.drafts import NOTHING, Draft, Wish
from tidegate.engine.scheduler import Key

SHORTEST, LONGEST = 2, 5
"""Tokens of an n-gram; single tokens recur too often to tell what follows."""

CATCH_UP_TOKENS: Final = 512
"""Indexed of one request before a step, about 1 ms; the beginning of a long prompt takes a few."""

_MOST_GRAMS: Final = 1 << 15
"""Of one request and half of its index: full, the older half goes. At most 8 MB."""

_KINDS: Final = {grams: f"lookup {grams}" for grams in range(SHORTEST, LONGEST + 1)}


class GramIndex:
    """Where each n-gram of a growing text occurred last. Two halves, so that it stays bounded."""

    def __init__(self, *, most_grams: int = _MOST_GRAMS) -> None:
        self.tokens: list[int] = []
        self._most = most_grams
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text. What ends at its last token is indexed once something follows."""
        text, young = self.tokens, self._young
        for token in tokens:
            end = len(text)
            for grams in range(SHORTEST, min(LONGEST, end) + 1):
                young[hash(tuple(text[end - grams :]))] = end
            text.append(token)
        if len(young) > self._most:
            self._old, self._young = young, {}

    def find(self) -> tuple[int, int] | None:
        """The longest suffix that occurred before, latest occurrence first.

        Returns:
            (its tokens, where what followed it begins), or None.
        """
        text = self.tokens
        for grams in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            gram = hash(tuple(text[-grams:]))
            follows = self._young.get(gram)
            if follows is None:
                follows = self._old.get(gram)
            if follows is not None:
                return grams, follows
        return None

    def guess(self, follows: int, most: int) -> tuple[int, ...]:
        """What followed, up to `most` tokens; a text that repeats is taken to go on repeating."""
        found = self.tokens[follows : follows + most]
        while len(found) < most:
            found += found[: most - len(found)]
        return tuple(found)


class LookupDrafter:
    """A `Drafter` with an index for each of the last requests it was asked about."""

    def __init__(self, *, most_requests: int) -> None:
        """Remember up to `most_requests`; of others the least recently met are forgotten."""
        self._most = most_requests
        self._indexes: dict[Key, GramIndex] = {}

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        """See `Drafter.propose`."""
        return [self._propose(wish) for wish in wishes]

    def observe(self, key: Key, accepted: int) -> None:
        """Nothing to learn: the index hears of every token by itself."""

    def _propose(self, wish: Wish) -> Draft:
        index = self._index(wish.key)
        begin = len(index.tokens)
        if begin < len(wish.tokens):
            index.extend(wish.tokens[begin : begin + CATCH_UP_TOKENS].tolist())
        if wish.most < 1 or len(index.tokens) < len(wish.tokens):
            return NOTHING
        found = index.find()
        if found is None:
            return NOTHING
        grams, follows = found
        return Draft(kind=_KINDS[grams], tokens=index.guess(follows, wish.most))

    def _index(self, key: Key) -> GramIndex:
        index = self._indexes.pop(key, None) or GramIndex()
        self._indexes[key] = index  # the latest is the last
        if len(self._indexes) > self._most:
            del self._indexes[next(iter(self._indexes))]
        return index
