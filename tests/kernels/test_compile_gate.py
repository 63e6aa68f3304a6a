"""Every kernel compiles for data-centre GPUs within their limits, without one at hand."""

from __future__ import annotations

import compilegate
import pytest


@pytest.mark.system
@pytest.mark.parametrize("module", compilegate.registered())
def test_every_variant_compiles_within_the_limits(module: str) -> None:
    found = compilegate.compiled(module)
    assert {one.sm for one in found} == {80, 90}
    wrong = [one for one in found if one.problem]
    assert not wrong, "\n".join(f"{one.variant} on sm_{one.sm}: {one.problem}" for one in wrong)


@pytest.mark.system
def test_what_is_wrong_with_a_kernel_is_told() -> None:
    problems = {(one.variant, one.sm): one.problem for one in compilegate.compiled("gatevariants")}
    for sm in (80, 90):
        assert problems["good", sm] == ""
        assert "tensor cores" in problems["no tensor cores", sm]
        assert "spills" in problems["spills", sm]
        assert "shared memory" in problems["too much shared memory", sm]
        assert "lacks ['INNER'], has too much ['DEPTH']" in problems["wrong arguments", sm]
