"""A guide through a finite set of texts, in plain Python: the twin of the matcher's masks.

A token may come when some text goes on with its bytes, an end when a text ends here. No more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from tidegate.engine.choosing import Mask


class NaiveGuide:
    """`spelling` holds the bytes of every token that is text; `ends` are the ids of ends."""

    def __init__(
        self, texts: Iterable[str], spelling: Mapping[int, bytes], ends: frozenset[int], vocab: int
    ) -> None:
        self.texts = [text.encode() for text in texts]
        self.said = b""
        self._spelling, self._ends, self._vocab = spelling, ends, vocab

    def allowed(self) -> set[int]:
        """The ids that may come next."""
        ends = set(self._ends) if self.said in self.texts else set()
        return ends | {
            token
            for token, spelt in self._spelling.items()
            if any(text.startswith(self.said + spelt) for text in self.texts)
        }

    def accept(self, token: int) -> None:
        """Move on."""
        self.said += self._spelling.get(token, b"")


def ids_of(mask: Mask) -> set[int]:
    """The ids whose bits are set."""
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def spelling_of(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of every token of a byte-level tokenizer, special ones left out."""
    special = tokenizer.get_added_tokens_decoder()
    letters = _letters()
    return {
        token: bytes(letters[letter] for letter in piece)
        for piece, token in tokenizer.get_vocab().items()
        if token not in special
    }


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: those that print stand for themselves, the others follow 255."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    letters |= {chr(256 + place): byte for place, byte in enumerate(hidden)}
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters
