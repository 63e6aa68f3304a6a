"""What a single token stands for, as bytes: whole words, or half a character.

`Tokenizer.decode` cannot say it, since a broken UTF-8 sequence decodes to U+FFFD. So this undoes
what the tokenizer's own decoder declares: GPT-2's map of bytes to characters, byte fallback
(`<0x0A>`), the mark for a blank, a word piece's prefix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import cast

from tokenizers import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of every token of one tokenizer. Safe to use from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token: one.content.encode() for token, one in added.items()}
        steps = list(_steps(tokenizer.decoder))
        kinds = {step.get("type") for step in steps}
        self._byte_of = _byte_of() if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        self._replaced = [pair for step in steps for pair in _replacements(step)]
        self._piece_prefix = next((str(s["prefix"]) for s in steps if s["type"] == "WordPiece"), "")

    def __call__(self, token: int) -> bytes:
        """The bytes of a token, also of a special one; none for an id the tokenizer lacks."""
        if token in self._added:
            return self._added[token]
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._byte_of is not None and all(char in self._byte_of for char in text):
            return bytes(self._byte_of[char] for char in text)
        if self._fallback and (found := _FALLBACK.fullmatch(text)):
            return bytes.fromhex(found[1])
        if self._piece_prefix:
            rest = text.removeprefix(self._piece_prefix)
            text = rest if rest != text else f" {text}"
        for old, new in self._replaced:
            text = text.replace(old, new)
        return str(text).encode()


def _steps(decoder: object) -> Iterator[dict[str, object]]:
    """The steps that a decoder declares, those of a sequence one by one."""
    if decoder is None:
        return
    # What the library pickles is the decoder's part of `tokenizer.json`.
    state = json.loads(cast(bytes, decoder.__getstate__()))
    yield from state["decoders"] if state.get("type") == "Sequence" else [state]


def _replacements(step: dict[str, object]) -> Iterator[tuple[str, str]]:
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            yield old, new
        case {"type": "Metaspace", "replacement": str(old)}:
            yield old, " "
        case {"type": "BPEDecoder", "suffix": str(old)}:
            yield old, " "


def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, others from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}
