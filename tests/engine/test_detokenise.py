"""Incremental text equals the text of the whole and never shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from toytext import VOCAB, toy_tokenizer

from tidegate.engine.detokenise import Detokeniser

TOKENIZER = toy_tokenizer()


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokeniser = Detokeniser(tokenizer)
    return [*(detokeniser.push(token) for token in tokens), detokeniser.flush()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back_whole_and_in_whole_characters(text: str) -> None:
    text = text.encode("utf-8", errors="ignore").decode("utf-8")
    emitted = pieces(TOKENIZER, TOKENIZER.encode(text).ids)
    assert "".join(emitted) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in emitted)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=250))
def test_any_tokens_give_the_text_of_the_whole(tokens: list[int]) -> None:
    assert "".join(pieces(TOKENIZER, tokens)) == TOKENIZER.decode(tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0x41]), max_size=300))
def test_broken_bytes_give_the_text_of_the_whole(data: list[int]) -> None:
    tokens = [_byte_token(byte) for byte in data]
    assert "".join(pieces(TOKENIZER, tokens)) == data_text(data)


@pytest.mark.parametrize("byte", [0x80, 0xF0, 0xE2, 0xC3])
def test_a_long_run_of_broken_bytes_flows_and_stays_cheap(byte: int) -> None:
    detokeniser = Detokeniser(TOKENIZER)
    token = _byte_token(byte)
    emitted = [detokeniser.push(token) for _ in range(2000)]
    assert len(detokeniser._window) <= 65
    assert len("".join(emitted)) >= 1990
    assert "".join(emitted) + detokeniser.flush() == TOKENIZER.decode([token] * 2000)


def test_a_character_appears_with_its_last_byte() -> None:
    tokens = [_byte_token(byte) for byte in "a€b😀".encode()]
    assert pieces(TOKENIZER, tokens) == ["a", "", "", "€", "b", "", "", "", "😀", ""]


def test_a_character_that_never_completes_comes_as_a_replacement_at_the_end() -> None:
    tokens = [_byte_token(byte) for byte in "a€".encode()[:-1]]
    assert pieces(TOKENIZER, tokens) == ["a", "", "", "\ufffd"]


def test_special_tokens_have_no_text() -> None:
    assert "".join(pieces(TOKENIZER, [0, 1, *TOKENIZER.encode("tide").ids, 0])) == "tide"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["▁tide", "▁", "gate", "é€😀", "▁is"]), max_size=12))
def test_sentencepiece_spaces_and_byte_fallback_come_back_whole(words: list[str]) -> None:
    tokenizer = _sentencepiece()
    tokens: list[int] = []
    for word in words:
        known = tokenizer.token_to_id(word)
        names = [word] if known is not None else [f"<0x{byte:02X}>" for byte in word.encode()]
        tokens += [tokenizer.get_vocab()[name] for name in names]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def _sentencepiece() -> Tokenizer:
    """The decoder of Llama 2 and Gemma over a handful of words and all bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁tide", "▁", "gate", "▁is"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


def _byte_token(byte: int) -> int:
    found = TOKENIZER.token_to_id(_BYTE_CHARS[byte])
    assert found is not None
    return int(found)


def data_text(data: list[int]) -> str:
    return bytes(data).decode("utf-8", errors="replace")


def _byte_chars() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


_BYTE_CHARS = _byte_chars()
