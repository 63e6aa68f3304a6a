"""Which path a request meant, in few words: a label must not take what strangers make up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from starlette.routing import BaseRoute, Route

from tidegate.api.metrics import Metrics

OTHER: Final = "other"
CLIENT_GONE: Final = 499
"""The status of a request whose client left before an answer, as nginx has it."""


class Responded:
    """Counts HTTP requests that are over, by the path of the route that served them."""

    def __init__(self, metrics: Metrics, routes: Iterable[BaseRoute]) -> None:
        self._metrics = metrics
        paths = [route.path for route in routes if isinstance(route, Route)]
        self._whole = frozenset(path for path in paths if "{" not in path)
        self._begun = tuple((path.split("{")[0], path) for path in paths if "{" in path)

    def __call__(self, path: str, status: int) -> None:
        """Count one; 0 for a request without an answer."""
        self._metrics.responded(self.route(path), status or CLIENT_GONE)

    def route(self, path: str) -> str:
        """The path of the route that serves `path`."""
        if path in self._whole:
            return path
        return next((route for begin, route in self._begun if path.startswith(begin)), OTHER)
