"""The settings of a daemon; whole daemons run in tests/system."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.edge.settings import EdgeSettings


@pytest.mark.parametrize(("keys", "shared"), [((), True), (("a",), True), (("a", "b"), False)])
def test_callers_with_keys_of_their_own_are_not_guessed_from_each_other(
    keys: tuple[str, ...], shared: bool
) -> None:
    settings = EdgeSettings(bundle=Path("bundle"), api_key_hashes=keys)
    assert settings.engine_settings().shared_guesses is shared
