"""Prompt lookup: what followed the last time a text went like this.

Answers repeat their prompts, themselves and each other: names, keys of JSON, quoted lines. The
longest suffix of two to five tokens that has occurred before is looked up, in the request's own
text and in the last answers to others, and what followed it then is the guess (prompt lookup
decoding, Saxena 2023). An index of n-grams makes that O(1) a token; it keeps hashes, since a rare
wrong guess costs a step's spare time and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
_MOST_GRAMS_ELSEWHERE: Final = 1 << 14
"""Of the last answers: 4 to 8 thousand tokens, in at most 4 MB that a busy device always has."""

_BREAK: Final = -1
"""Between texts of an index; no token."""

_ONCE, _VARIED, _AGAIN, _ALWAYS = range(4)
"""What followed an n-gram so far: it occurred once; the last two times something different; the
last two times the same; three times or more. That tells more of a guess than the length of the
n-gram: of the assistant's mixed answers 0.2 to 0.7, 0.1 to 0.4, 0.7 and 0.75 to 0.85 of the tokens
held."""

_LIKELY: Final = (0.5, 0.2, 0.7, 0.8)
_STEADINESS: Final = ("once", "varied", "again", "always")


def _kinds(source: str) -> dict[tuple[int, int], str]:
    return {
        (grams, steady): f"{source} {grams} {name}"
        for grams in range(SHORTEST, LONGEST + 1)
        for steady, name in enumerate(_STEADINESS)
    }


_KINDS: Final = _kinds("lookup")
_KINDS_ELSEWHERE: Final = _kinds("answers")


@dataclass(frozen=True, slots=True)
class Found:
    """An n-gram that ends a text and occurred in an index."""

    grams: int
    """Its tokens."""
    follows: int
    """Where what followed it the last time begins."""
    steady: int
    """Whether the same has always followed it; an index of `_STEADINESS`."""


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
        """4 * where what follows an n-gram begins + its steadiness."""
        self._old: dict[int, int] = {}
        self._young_begin = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text. What ends at its last token is indexed once something follows."""
        text, young, old, suffix = self._text, self._young, self._old, self.suffix
        begin = self._begin
        for token in tokens:
            entry = 4 * (begin + len(text))
            for gram in suffix:
                last = young.get(gram)
                if last is None:
                    last = old.get(gram)
                place = -1 if last is None else (last >> 2) - begin
                if last is None or place < 0:
                    young[gram] = entry
                elif text[place] != token:
                    young[gram] = entry + _VARIED
                else:
                    young[gram] = entry + (_ALWAYS if last & 3 >= _AGAIN else _AGAIN)
            text.append(token)
            suffix = _suffix(text)
        self.suffix = suffix
        self.length = self._begin + len(text)
        if len(young) > self._most:
            self._forget()

    def find(self, suffix: Sequence[int], *, shortest: int = SHORTEST) -> Found | None:
        """The longest n-gram of a `suffix`, of this text or another, at its latest occurrence."""
        grams, entry = shortest - SHORTEST, -1
        # Where a longer one occurred, the shorter ones that end it did too.
        young, old = self._young, self._old
        while grams < len(suffix):
            later = young.get(suffix[grams])
            if later is None:
                later = old.get(suffix[grams])
            if later is None or later >> 2 < self._begin:
                break
            entry = later
            grams += 1
        if entry < 0:
            return None
        return Found(grams - 1 + SHORTEST, entry >> 2, entry & 3)

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
        self._latest: Key | None = None
        self._answers = GramIndex(most_grams=_MOST_GRAMS_ELSEWHERE)

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        """See `Drafter.propose`."""
        return [self._propose(wish) for wish in wishes]

    def observe(self, key: Key, accepted: int) -> None:
        """Nothing to learn: the index hears of every token by itself."""

    def remember(self, ended: Ended) -> None:
        """See `Drafter.remember`; with the last tokens of its prompt, which the answer follows."""
        self._indexes.pop(ended.key, None)
        if ended.key == self._latest:
            self._latest = None
        if ended.shared and self._share:
            begin = max(0, ended.prompt_tokens - LONGEST)
            self._answers.extend([*ended.tokens[begin:][:CATCH_UP_TOKENS].tolist(), _BREAK])

    def _propose(self, wish: Wish) -> Draft:
        index, length = self._index(wish.key), len(wish.tokens)
        if index.length < length:
            index.extend(wish.tokens[index.length : index.length + CATCH_UP_TOKENS].tolist())
        if wish.most < 1 or index.length < length:
            return NOTHING
        own = index.find(index.suffix)
        if wish.shared and (own is None or own.grams < LONGEST):
            elsewhere = self._elsewhere(index.suffix, own, wish.most)
            if elsewhere.tokens:
                return elsewhere
        if own is None:
            return NOTHING
        tokens = repeated(index.following(own.follows, wish.most), wish)
        kind = _KINDS[own.grams, own.steady]
        return Draft(kind=kind, tokens=tokens, likely=_LIKELY[own.steady])

    def _elsewhere(self, suffix: list[int], own: Found | None, most: int) -> Draft:
        """What followed in another answer, if more tokens agree there than in its own text."""
        shortest = _SHORTEST_ELSEWHERE if own is None else max(_SHORTEST_ELSEWHERE, own.grams + 1)
        found = self._answers.find(suffix, shortest=shortest)
        if found is None:
            return NOTHING
        tokens = self._answers.following(found.follows, most)
        if _BREAK in tokens:
            tokens = tokens[: tokens.index(_BREAK)]
        kind = _KINDS_ELSEWHERE[found.grams, found.steady]
        return Draft(kind=kind, tokens=tuple(tokens), likely=_LIKELY[found.steady])

    def _index(self, key: Key) -> GramIndex:
        if key == self._latest:
            return self._indexes[key]
        index = self._indexes.pop(key, None) or GramIndex()
        self._indexes[key] = index  # the latest is the last
        self._latest = key
        if len(self._indexes) > self._most:
            del self._indexes[next(iter(self._indexes))]
        return index


def repeated(tokens: list[int], wish: Wish) -> tuple[int, ...]:
    """As many tokens as are wished; a text that repeats itself is taken to go on repeating."""
    found = list(tokens)
    while len(found) < wish.most:
        found += found[: wish.most - len(found)]
    return tuple(found)
