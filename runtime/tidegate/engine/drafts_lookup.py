"""Prompt lookup: what followed the last time a text went like this.

Answers repeat their prompts, themselves and each other: names, keys of JSON, quoted lines. The
longest suffix of two to five tokens that has occurred before is looked up, in the request's own
text and in the last answers to others, and what followed it then is the guess (prompt lookup
decoding, Saxena 2023). An index of n-grams makes that O(1) a token; it keeps hashes, since a rare
wrong guess costs a step's spare time and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.engine.drafts import NOTHING, Draft, Ended, Wish
from tidegate.engine.scheduler import Key

SHORTEST, LONGEST = 2, 5
"""Tokens of an n-gram; single tokens recur too often to tell what follows."""
_SHORTEST_ELSEWHERE: Final = 3
"""In other answers: two tokens occur in too many."""

CATCH_UP_TOKENS: Final = 512
"""Indexed of one request before a step, about 1 ms; the beginning of a long prompt takes a few."""

_MOST_GRAMS: Final = 1 << 15
"""Of one request and half of its index: full, the older half goes. At most 8 MB."""

_BREAK: Final = -1
"""Between texts of an index; no token."""

_KINDS: Final = {grams: f"lookup {grams}" for grams in range(SHORTEST, LONGEST + 1)}
_KINDS_ELSEWHERE: Final = {grams: f"answers {grams}" for grams in range(SHORTEST, LONGEST + 1)}


class GramIndex:
    """Where each n-gram of a growing text occurred last. Two halves, so that it stays bounded."""

    def __init__(self, *, most_grams: int = _MOST_GRAMS) -> None:
        self.length = 0
        """Tokens of the text, those forgotten too."""
        self.suffix: list[int] = []
        """The n-grams that end the text, shortest first."""
        self._text: list[int] = []
        self._begin = 0
        self._most = most_grams
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._young_begin = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text. What ends at its last token is indexed once something follows."""
        text, young, suffix = self._text, self._young, self.suffix
        for token in tokens:
            follows = self._begin + len(text)
            for gram in suffix:
                young[gram] = follows
            text.append(token)
            suffix = _suffix(text)
        self.suffix = suffix
        self.length = self._begin + len(text)
        if len(young) > self._most:
            self._forget()

    def find(self, suffix: Sequence[int], *, shortest: int = SHORTEST) -> tuple[int, int] | None:
        """The longest n-gram of a `suffix`, of this text or another, and its latest occurrence.

        Returns:
            (its tokens, where what followed it begins), or None.
        """
        found: tuple[int, int] | None = None
        # Where a longer one occurred, the shorter ones that end it did too.
        for grams, gram in enumerate(suffix[shortest - SHORTEST :], shortest):
            follows = self._young.get(gram)
            if follows is None:
                follows = self._old.get(gram)
            if follows is None or follows < self._begin:
                break
            found = grams, follows
        return found

    def following(self, follows: int, most: int) -> list[int]:
        """What stands from `follows` on, up to `most` tokens."""
        begin = follows - self._begin
        return self._text[begin : begin + most]

    def _forget(self) -> None:
        """Let the older half go, and the text that only it knew."""
        cut = self._young_begin - self._begin
        del self._text[:cut]
        self._begin = self._young_begin
        self._young_begin = self.length
        self._old, self._young = self._young, {}


def _suffix(text: Sequence[int]) -> list[int]:
    """Hashes of the n-grams that end `text`, shortest first."""
    gram, grams = text[-1], []
    for place in range(2, min(LONGEST, len(text)) + 1):
        gram = hash((text[-place], gram))
        grams.append(gram)
    return grams


class LookupDrafter:
    """A `Drafter` with an index for each of the last requests, and one of the last answers."""

    def __init__(self, *, most_requests: int, share: bool = True) -> None:
        """Remember up to `most_requests`; of others the least recently met are forgotten.

        Args:
            most_requests: whose own text is indexed.
            share: answers to one request may be guesses for another.
        """
        self._most = most_requests
        self._share = share
        self._indexes: dict[Key, GramIndex] = {}
        self._answers = GramIndex()

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        """See `Drafter.propose`."""
        return [self._propose(wish) for wish in wishes]

    def observe(self, key: Key, accepted: int) -> None:
        """Nothing to learn: the index hears of every token by itself."""

    def remember(self, ended: Ended) -> None:
        """See `Drafter.remember`; with the last tokens of its prompt, which the answer follows."""
        self._indexes.pop(ended.key, None)
        if ended.shared and self._share:
            begin = max(0, ended.prompt_tokens - LONGEST)
            self._answers.extend([*ended.tokens[begin:][:CATCH_UP_TOKENS].tolist(), _BREAK])

    def _propose(self, wish: Wish) -> Draft:
        index = self._index(wish.key)
        if index.length < len(wish.tokens):
            index.extend(wish.tokens[index.length : index.length + CATCH_UP_TOKENS].tolist())
        if wish.most < 1 or index.length < len(wish.tokens):
            return NOTHING
        own = index.find(index.suffix)
        if own is None or own[0] < LONGEST:
            elsewhere = self._elsewhere(index.suffix, own, wish) if wish.shared else NOTHING
            if elsewhere.tokens:
                return elsewhere
        if own is None:
            return NOTHING
        grams, follows = own
        return Draft(kind=_KINDS[grams], tokens=repeated(index.following(follows, wish.most), wish))

    def _elsewhere(self, suffix: list[int], own: tuple[int, int] | None, wish: Wish) -> Draft:
        """What followed in another answer, if more tokens agree there than in its own text."""
        shortest = _SHORTEST_ELSEWHERE if own is None else max(_SHORTEST_ELSEWHERE, own[0] + 1)
        found = self._answers.find(suffix, shortest=shortest)
        if found is None:
            return NOTHING
        grams, follows = found
        tokens = self._answers.following(follows, wish.most)
        if _BREAK in tokens:
            tokens = tokens[: tokens.index(_BREAK)]
        return Draft(kind=_KINDS_ELSEWHERE[grams], tokens=tuple(tokens))

    def _index(self, key: Key) -> GramIndex:
        index = self._indexes.pop(key, None) or GramIndex()
        self._indexes[key] = index  # the latest is the last
        if len(self._indexes) > self._most:
            del self._indexes[next(iter(self._indexes))]
        return index


def repeated(tokens: list[int], wish: Wish) -> tuple[int, ...]:
    """As many tokens as are wished; a text that repeats itself is taken to go on repeating."""
    found = list(tokens)
    while len(found) < wish.most:
        found += found[: wish.most - len(found)]
    return tuple(found)
