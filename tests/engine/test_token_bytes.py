"""One token's bytes: they join to the text, whichever way the tokenizer writes its tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from toytext import toy_tokenizer

from tidegate.engine.token_bytes import TokenBytes

TOKENIZER = toy_tokenizer()
BYTES = TokenBytes(TOKENIZER)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_level_tokens_join_to_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert b"".join(map(BYTES, ids)) == text.encode()


def test_special_tokens_have_their_name_and_unknown_ids_nothing() -> None:
    assert BYTES(0) == b"<|end|>"
    assert BYTES(100_000) == b""


def test_byte_fallback_and_the_mark_for_a_blank_are_undone() -> None:
    vocab = {"<unk>": 0, "▁Hi": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "▁": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    of = TokenBytes(tokenizer)
    assert [of(token) for token in (1, 2, 3, 4, 5)] == [b" Hi", b"\xe2", b"\x82", b"\xac", b" "]
    assert b"".join(map(of, [1, 2, 3, 4])).decode() == " Hi€"


def test_a_metaspace_is_a_blank_and_word_pieces_join_without_one() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁tide": 0}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    assert TokenBytes(tokenizer)(0) == b" tide"
    pieces = Tokenizer(models.WordPiece(vocab={"tide": 0, "##s": 1}, unk_token="tide"))
    pieces.decoder = decoders.WordPiece()
    assert [TokenBytes(pieces)(token) for token in (0, 1)] == [b" tide", b"s"]


def test_a_tokenizer_without_a_decoder_gives_its_tokens_as_they_are() -> None:
    tokenizer = Tokenizer(models.WordLevel(vocab={"sea": 0}, unk_token="sea"))
    tokenizer.add_tokens([AddedToken("gate", special=False)])
    assert [TokenBytes(tokenizer)(token) for token in (0, 1)] == [b"sea", b"gate"]
