"""Tokens to text as they come, never half a character.

Byte-level tokens may end in the middle of a UTF-8 sequence; the tokenizer then decodes the rest to
U+FFFD. Text that ends so is held until the character is complete. Each push decodes a short window
of tokens, not the whole answer: it starts at the tokens of the last emission, which gives decoders
that look at what came before (leading spaces) their context.
"""

from __future__ import annotations

from typing import Final

from tokenizers import Tokenizer

from tidegate.engine.token_bytes import TokenBytes

_REPLACEMENT: Final = "\ufffd"
_MOST_HELD: Final = 8
"""Characters: a broken UTF-8 sequence is at most 3, after 4 of a byte-fallback run's last one."""
_WINDOW: Final = 64
_KEPT: Final = 16
"""Tokens. A window of only broken bytes restarts here; UTF-8 finds its place again within four."""


class Detokeniser:
    """One answer's text. The texts of all `push` and of `flush` join to the decoded whole.

    Exact for byte-level decoders; with byte fallback also, except that a run of byte tokens which
    is not valid UTF-8 as a whole keeps the characters that were complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        token_bytes: TokenBytes | None = None,
        *,
        visible: frozenset[int] = frozenset(),
    ) -> None:
        """Begin an answer; `visible` are special tokens whose text is a part of it."""
        self._tokenizer = tokenizer
        self._visible = visible
        self._token_bytes = token_bytes
        self._window: list[int] = []
        self._read = 0
        self._emitted = 0

    def push(self, token: int) -> str:
        """New complete text after one more token; empty while a character is incomplete."""
        if token in self._visible:
            return self.flush() + (self._tokenizer.id_to_token(token) or "")
        self._window.append(token)
        text = self._decode(self._window)
        trailing = len(text) - len(text.rstrip(_REPLACEMENT))
        stable = max(self._emitted, len(text) - min(trailing, _MOST_HELD))
        new, self._emitted = text[self._emitted : stable], stable
        if not trailing and new:
            self._restart(self._read)
        elif len(self._window) > _WINDOW:
            self._shrink(held=len(text) - stable)
        return new

    def flush(self) -> str:
        """What is left when the answer has ended, incomplete characters as U+FFFD."""
        text = self._decode(self._window)[self._emitted :]
        self._window, self._read, self._emitted = [], 0, 0
        return text

    def data(self, token: int) -> bytes:
        """The bytes that one token stands for, whatever is around it."""
        if self._token_bytes is None:
            self._token_bytes = TokenBytes(self._tokenizer)
        return self._token_bytes(token)

    def _restart(self, start: int) -> None:
        """Keep the tokens of this emission as context for the next."""
        self._window = self._window[start:]
        self._read = len(self._window)
        self._emitted = len(self._decode(self._window))

    def _shrink(self, held: int) -> None:
        self._window = self._window[-_KEPT:]
        self._read = 0
        self._emitted = max(0, len(self._decode(self._window)) - held)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
