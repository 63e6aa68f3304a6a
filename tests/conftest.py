"""Property tests search anew on every run of a developer, and repeat the same search in CI.

A change must not fail to land because of another's rare example; whoever finds one adds it to its
test as an `@example`. No example fails because the machine was busy.
"""

from __future__ import annotations

import gc
import os

import gpus
import pytest
from hypothesis import settings

# Matrices of tests are tiny: two processes of two threads each would wait for one another. Read
# when numpy and torch are first imported, which no conftest does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides when a kernel is defined whether it is compiled or interpreted. Without a GPU it
# is interpreted here; what has to be compiled is compiled in processes of its own.
if gpus.DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Its default changes with 3.10, and 3.9 warns as long as nothing is said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


def pytest_collection() -> None:
    """Search for no garbage while collecting: next to nothing of what it makes is."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, what needs one is skipped by name; it never passes unseen."""
    if gpus.DEVICE == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep what collecting has made out of every later search for garbage.

    Modules, code and test items are some 400 000 objects that live to the end: going through them
    again and again takes a seventh of the unit suite's processor time.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Let the interpreter end as it does without this, or Triton's library reports leaks."""
    gc.unfreeze()
