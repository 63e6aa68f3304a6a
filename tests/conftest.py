"""Property tests search anew on every run of a developer, and repeat the same search in CI.

A change must not fail to land because of another's rare example; whoever finds one adds it to its
test as an `@example`.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
