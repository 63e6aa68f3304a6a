"""What a pool says of a model that could not be read or loaded: to its log, and to callers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tidegate.errors import CapacityError, TidegateError, UnavailableError, describe_defect

_log = logging.getLogger(__name__)


@contextmanager
def told_by_name(name: str, doing: str) -> Iterator[None]:
    """The boundary to what reads files and takes memory: its errors become ours, and are logged."""
    try:
        yield
    except TidegateError:
        raise
    except Exception as error:
        _log.error("model %s: %s", name, describe_defect(error))
        raise UnavailableError(f"model {name!r}: {type(error).__name__} while {doing}") from error


def told(name: str, failure: TidegateError) -> TidegateError:
    """What a caller may know of a failed load; a message may name files, and is for the log."""
    if isinstance(failure, CapacityError):
        return CapacityError(str(failure), retry_after_s=failure.retry_after_s)
    return UnavailableError(f"model {name!r} could not be loaded; the service's log has the reason")
