"""Masks are what a plain reading of the grammar allows, token by token, whatever the tokenizer."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naiveguide import NaiveGuide, ids_of, spelling_of
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from toytext import EOS, SPECIAL, VOCAB, toy_text, toy_tokenizer

from tidegate.engine.choosing import Ask, choose
from tidegate.engine.grammar import Grammars
from tidegate.engine.guide import GrammarGuide
from tidegate.engine.request import Constraint, ConstraintKind, SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError

WIDE = VOCAB + 45
"""A model's vocabulary is often padded beyond the tokenizer's."""
TEXT = toy_text()
GRAMMARS = Grammars(TEXT, vocab=WIDE)


def guide_of(constraint: Constraint, grammars: Grammars = GRAMMARS) -> GrammarGuide:
    asyncio.run(grammars.prepare(constraint))
    return grammars.guide(constraint)


def constrained(kind: ConstraintKind, source: object, begun: str = "") -> Constraint:
    text = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
    return Constraint(kind=kind, source=text, begun=begun)


def accepted_of(guide: GrammarGuide, tokens: Sequence[int]) -> set[int]:
    """Which of the tokens it takes without a mask."""
    copies = (GrammarGuide(guide._matcher.deep_copy(), vocab=WIDE) for _ in tokens)
    return {one for one, copy in zip(tokens, copies, strict=True) if copy.accept_some([one])}


def follow_both(guide: GrammarGuide, naive: NaiveGuide, seed: int) -> None:
    """Walk at random to an end, comparing every mask with the twin's."""
    chance = np.random.default_rng(seed)
    for _ in range(100):
        found, expected = ids_of(guide.mask()), naive.allowed()
        forced = guide.forced().tolist()
        if forced:
            # Where only one text can follow, the matcher wants the tokens it is usually cut into.
            assert found == {forced[0]}
            assert found <= expected
        else:
            assert found == expected
        some = [*chance.choice(WIDE, 8).tolist(), *chance.choice(sorted(found), 4).tolist()]
        assert (found & {*some}) - {EOS} <= accepted_of(guide, some) <= found
        token = int(chance.choice(sorted(found)))
        guide.accept(token)
        naive.accept(token)
        if token == EOS:
            assert ids_of(guide.mask()) == {EOS}
            return
    raise AssertionError("a finite language has an end")


TEXTS = st.lists(st.text('abé\n"\\/{😀', min_size=1, max_size=6), min_size=1, max_size=6)


@settings(deadline=None)
@given(TEXTS, st.integers(0, 2**32))
def test_a_choice_allows_what_spells_one_of_its_texts(texts: list[str], seed: int) -> None:
    naive = NaiveGuide(texts, spelling_of(toy_tokenizer()), frozenset({EOS}), WIDE)
    follow_both(guide_of(constrained("choice", texts)), naive, seed)


@pytest.mark.parametrize(
    "pattern", ["[ab]{1,4}", "^a(b|c)?$", "(the|them|the tide)", "a?b?c?d?", "(ab|a)(c|bc)", "a|"]
)
def test_a_regex_allows_what_completes_to_a_match_of_the_whole(pattern: str) -> None:
    words = ["".join(letters) for n in range(5) for letters in itertools.product("abcd", repeat=n)]
    words += ["the", "them", "the tide", "abbc"]
    texts = [word for word in words if re.fullmatch(pattern, word)]
    for seed in range(6):
        naive = NaiveGuide(texts, spelling_of(toy_tokenizer()), frozenset({EOS}), WIDE)
        follow_both(guide_of(constrained("regex", pattern)), naive, seed)


def test_a_lark_grammar_counts_brackets_which_no_regex_can() -> None:
    guide = guide_of(constrained("grammar", 'start: "(" start? ")"'))
    spelt = {text: token for token, text in spelling_of(toy_tokenizer()).items()}
    for letter in (b"(", b"(", b")"):
        guide.accept(spelt[letter])
    assert spelt[b")"] in ids_of(guide.mask())
    assert EOS not in ids_of(guide.mask())
    guide.accept(spelt[b")"])
    assert ids_of(guide.mask()) == {EOS}


def test_a_token_that_is_not_allowed_is_an_error_and_not_a_wrong_answer() -> None:
    guide = guide_of(constrained("choice", ["yes"]))
    with pytest.raises(RequestError, match="constraint: the grammar cannot go on"):
        guide.accept(EOS)


def test_special_tokens_and_padding_are_never_text() -> None:
    mask = ids_of(guide_of(constrained("regex", r"(.|\n)*")).mask())
    assert mask & set(range(len(SPECIAL))) == {EOS}
    assert not mask & set(range(VOCAB, WIDE))


def test_a_guide_goes_on_where_another_model_left_off() -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    guide = guide_of(constrained("json_schema", schema, begun='{"on": tr'))
    assert TEXT.decode(guide.forced().tolist()) == "ue"
    with pytest.raises(RequestError, match="the answer's beginning does not follow it"):
        guide_of(constrained("json_schema", schema, begun='{"off'))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_as_a_guess_always_hold_and_change_nothing(temperature: float) -> None:
    """What must come next can be run in one step, since the masks allow nothing else."""
    schema = {
        "type": "object",
        "properties": {"temperature": {"enum": ["hot", "cold"]}, "lamp": {"type": "boolean"}},
        "required": ["temperature", "lamp"],
        "additionalProperties": False,
    }
    params = SamplingParams(max_tokens=99, temperature=temperature)
    logits = np.random.default_rng(1).normal(0, 2, (200, WIDE)).astype(np.float32)

    def answer(*, guess: bool) -> tuple[list[int], int]:
        guide, tokens, steps = guide_of(constrained("json_schema", schema)), [1], 0
        while tokens[-1] != EOS:
            at = len(tokens)
            draft = guide.forced() if guess else np.empty(0, np.int64)
            draw = Draw(params=params, seed=9, position=at)
            rows = logits[at : at + 1 + len(draft)]
            (choice,) = choose(rows, [Ask(draw=draw, draft=draft, guide=guide)])
            found = [one.token for one in choice.sampled]
            assert found[: len(draft)] == draft.tolist()
            tokens, steps = tokens + found, steps + 1
        return tokens, steps

    alone, single_steps = answer(guess=False)
    together, fewer_steps = answer(guess=True)
    assert together == alone
    assert fewer_steps < single_steps / 2
    assert set(json.loads(TEXT.decode(together[1:]))) == {"temperature", "lamp"}


def byte_fallback_text() -> TextModel:
    """A tokenizer as Llama 2's: words with a mark for blanks, bytes for what has no word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdehilmnopt", "\u2581lamp", "lamp", "on", "tide"]
    merges = [("o", "n")]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in pieces[:3]])
    return TextModel(tokenizer, eos_ids=frozenset({2}), context_tokens=64)


def test_tokenizers_that_fall_back_to_bytes_are_guided_too() -> None:
    text = byte_fallback_text()
    grammars = Grammars(text, vocab=300)
    wanted = {"a lamp on", "tide é😀"}
    said = set()
    for seed in range(20):
        guide, tokens = guide_of(constrained("choice", sorted(wanted)), grammars), [0]
        chance = np.random.default_rng(seed)
        while tokens[-1] != 2:
            tokens.append(int(chance.choice(sorted(ids_of(guide.mask())))))
            guide.accept(tokens[-1])
        said.add(text.decode(tokens[1:]))
    assert said == wanted
