"""Files laid over one another: what wins, what is kept, and a source goes with its number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.profile_merge import Layer, merge

NAMES = st.sampled_from(["a", "b", "c"])
TABLES = st.dictionaries(
    NAMES,
    st.recursive(
        st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2)),
        lambda inner: st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


def plainly(over: object, under: object) -> object:
    """The twin: tables merge, everything else is replaced."""
    if isinstance(over, dict) and isinstance(under, dict):
        keys = {**under, **over}
        return {
            key: plainly(over[key], under.get(key)) if key in over else under[key] for key in keys
        }
    return over


@given(st.lists(TABLES, min_size=1, max_size=4))
def test_tables_merge_and_everything_else_is_replaced(tables: list[dict[str, object]]) -> None:
    wanted: object = {}
    for table in tables:
        wanted = plainly(table, wanted)
    merged, _ = merge([Layer(file=str(n), table=table) for n, table in enumerate(tables)])
    assert merged == wanted


@given(TABLES, TABLES)
def test_merging_changes_no_file(under: dict[str, object], over: dict[str, object]) -> None:
    before = repr((under, over))
    merge([Layer(file="under", table=under), Layer(file="over", table=over)])
    assert repr((under, over)) == before


def test_a_key_is_of_the_file_that_brought_it_last() -> None:
    under = Layer(file="under", table={"a": {"b": 1, "c": [{"a": 1}]}})
    over = Layer(file="over", table={"a": {"c": []}})
    _, origins = merge([under, over])
    assert str(origins.error(("a", "b"), 1, "x")).startswith("under: a.b = 1")
    assert str(origins.error(("a", "c", "[0]", "a"), 1, "x")).startswith("over: a.c[0].a = 1")


def test_a_number_that_is_overridden_loses_its_source_and_others_keep_theirs() -> None:
    under = Layer(file="under", table={"t": {"x": 1, "y": 2, "src": "old"}})
    merged, _ = merge([under, Layer(file="over", table={"t": {"x": 3}})])
    assert merged["t"]["src"] == {"y": "old"}
    merged, _ = merge([under, Layer(file="over", table={"t": {"x": 3, "src": "new"}})])
    assert merged["t"]["src"] == {"x": "new", "y": "old"}
