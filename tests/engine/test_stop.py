"""Stop strings: never emitted, whatever the chunks; everything before them always is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engine.stop import StopStrings


def feed(stops: tuple[str, ...], chunks: list[str]) -> tuple[str, bool]:
    matcher, text = StopStrings(stops), ""
    for chunk in chunks:
        emitted, stopped = matcher.push(chunk)
        text += emitted
        if stopped:
            return text, True
    return text + matcher.flush(), False


def test_a_stop_string_across_chunks_is_found() -> None:
    assert feed(("END",), ["hello E", "N", "D and more"]) == ("hello ", True)


def test_a_false_start_is_given_back() -> None:
    assert feed(("END",), ["hello EN", "G", "LISH"]) == ("hello ENGLISH", False)
    assert feed(("END",), ["hello EN"]) == ("hello EN", False)


def test_of_several_the_earliest_in_the_text_wins() -> None:
    assert feed(("later", "now"), ["what now and later"]) == ("what ", True)


def test_nothing_is_held_without_a_reason() -> None:
    assert StopStrings(("END",)).push("hello") == ("hello", False)
    assert StopStrings(()).push("EN") == ("EN", False)


@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(1, 5), min_size=40, max_size=40),
)
def test_chunks_do_not_matter(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    chunks, at = [], 0
    for cut in cuts:
        chunks.append(text[at : at + cut])
        at += cut
    emitted, stopped = feed(stops, chunks)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert emitted == text
        return
    # Chunks may end before an earlier but longer match is complete; nothing of any stop leaks.
    assert text.startswith(emitted)
    assert not any(stop in emitted for stop in stops)
    assert any(text.startswith(stop, len(emitted)) for stop in stops)
