"""The page of an evaluation: well formed, complete, and loads nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from tidegate.converters.evaluation.page import Candidate, LayerError, page, pareto
from tidegate.model.quality import ConfidenceBin


def candidate(name: str, size_mb: float, kl_mean: float, *, best: bool = False) -> Candidate:
    return Candidate(
        name=name,
        size_mb=size_mb,
        bits_per_weight=4.5,
        kl_mean=kl_mean,
        kl_p99=kl_mean * 9,
        agreement=0.97,
        perplexity=12.5,
        exact_match=None,
        best=best,
    )


def test_every_candidate_layer_and_bin_is_on_the_page_and_names_are_escaped() -> None:
    found = page(
        "edge <b>",
        candidates=[candidate("a&b", 1.5, 0.02, best=True), candidate("other", 3.0, 0.001)],
        layers=[LayerError(layer=i, error=0.02 * i) for i in range(40)],
        confidence=[ConfidenceBin(margin=0.5, share=0.25, agreement=0.75)],
        notes=["a <note>"],
    )
    assert "edge &lt;b&gt;" in found
    assert "a &lt;note&gt;" in found
    assert "a&amp;b *" in found
    assert found.count("<rect") == 40
    assert "75.00%" in found
    assert not re.search(r"(src|href)=|https?://|<script", found)
    for picture in re.findall(r"<svg.*?</svg>", found, re.DOTALL):
        ElementTree.fromstring(picture)


@pytest.mark.parametrize("errors", [[0.0], [0.0, 0.0], [1e-12, 5.0], [0.3, 0.3]])
def test_extreme_values_stay_inside_the_picture(errors: list[float]) -> None:
    found = page(
        "extremes", candidates=[candidate(str(i), 2.0 + i, kl) for i, kl in enumerate(errors)]
    )
    for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', found):
        assert 0 <= float(x) <= 720
        assert 0 <= float(y) <= 320


def test_parts_without_data_are_left_out() -> None:
    assert "<svg" not in page("nothing")
    assert "Confidence" not in page("nothing")


def test_a_candidate_is_best_when_no_other_beats_it_in_size_and_error() -> None:
    assert pareto([1, 2, 3, 3], [5, 4, 4, 1]) == [True, True, False, True]
    assert pareto([1, 1], [2, 2]) == [True, True]
