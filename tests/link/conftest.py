"""What several tests of the link begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from coreends import Ends


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    ends = Ends(tmp_path)
    ends.meet()
    yield ends
    ends.close()
