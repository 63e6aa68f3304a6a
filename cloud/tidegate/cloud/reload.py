"""Reading a service's settings again while it runs: its models change, nothing else does.

On SIGHUP, or by `POST /admin/reload`, which a key needs the scope `admin` for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Final, cast

from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tidegate.api.answers import error_object
from tidegate.api.body import read_json
from tidegate.api.hangup import on_hangup
from tidegate.api.operating import RELOAD, RELOAD_MODE
from tidegate.api.settings import HttpSettings
from tidegate.cloud.model_updates import Change, Mode, PoolUpdater
from tidegate.cloud.served_models import Models
from tidegate.errors import CapacityError, TidegateError

if TYPE_CHECKING:
    from tidegate.cloud.service import CloudSettings

_log = logging.getLogger(__name__)

PATH: Final = "/admin/reload"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a reload did."""

    changes: tuple[Change, ...]
    after_restart: tuple[str, ...]
    """Settings that changed and hold once the service was started again."""

    @property
    def problems(self) -> list[str]:
        """What was not done."""
        return [f"{one.name}: {one.problem}" for one in self.changes if one.problem is not None]


class Reloader:
    """Reads the settings again and updates the pool.

    Args:
        pool: whose models change.
        settings: that the service was opened with.
        reread: reads them again; the same ones, where they are in no file. Files of models may have
            changed all the same.
    """

    def __init__(
        self,
        pool: Models,
        settings: CloudSettings,
        reread: Callable[[], CloudSettings] | None,
    ) -> None:
        self._updater = PoolUpdater(pool)
        self._settings, self._reread = settings, reread or (lambda: settings)

    async def reload(self, mode: Mode | None = None) -> Report:
        """Apply what is written now.

        Args:
            mode: how versions are replaced; None for what the settings say.

        Raises:
            CapacityError: a reload is running.
            TidegateError: a setting or a model is wrong: nothing was changed.
        """
        now = await asyncio.to_thread(self._reread)
        changes = await self._updater.apply(now.models, mode or now.update)
        later = tuple(
            field.name
            for field in fields(now)
            if field.name not in ("models", "update")
            and getattr(now, field.name) != getattr(self._settings, field.name)
        )
        if later:
            _log.warning("reload: %s changed, which takes a restart", ", ".join(later))
        return Report(changes=changes, after_restart=later)

    async def on_signals(self) -> None:
        """Reload on every SIGHUP; runs until cancelled."""
        hung_up = asyncio.Event()
        with on_hangup(hung_up.set):
            while True:
                await hung_up.wait()
                hung_up.clear()
                try:
                    report = await self.reload()
                except TidegateError as error:
                    _log.error("reload: nothing was changed: %s", error)
                    continue
                for problem in report.problems:
                    _log.error("reload: %s", problem)
                _log.info("reload: done, %d problems", len(report.problems))


def reload_route(reloader: Reloader, settings: HttpSettings) -> Route:
    """`POST /admin/reload` with `{}` or `{"mode": "beside" | "drain-first"}`."""
    return Route(PATH, ReloadEndpoint(reloader, settings), methods=["POST"])


class ReloadEndpoint:
    """An ASGI endpoint. Its caller may see what names files: the scope is the operator's."""

    def __init__(self, reloader: Reloader, settings: HttpSettings) -> None:
        self._reloader, self._settings = reloader, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        asked = RELOAD.open(await read_json(scope, receive, self._settings))
        mode = cast(Mode | None, RELOAD_MODE.read(asked))
        status, body = await self._answer(mode)
        await JSONResponse(body, status)(scope, receive, send)

    async def _answer(self, mode: Mode | None) -> tuple[int, dict[str, object]]:
        try:
            # A client that leaves does not stop half an update.
            report = await asyncio.shield(asyncio.ensure_future(self._reloader.reload(mode)))
        except CapacityError:
            raise
        except TidegateError as error:
            return 409, error_object(str(error), status=409, code=error.code)
        body: dict[str, object] = asdict(report)
        if report.problems:
            told = "; ".join(report.problems)
            body = {**error_object(told, status=409, code="update_failed"), **body}
            return 409, body
        return 200, body
