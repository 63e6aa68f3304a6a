"""`CloudBackend`: a pool of models as one backend, with what the link and the keys counted."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, replace

from tidegate.api.admission import CallSize
from tidegate.api.backend import AnswerEvent, Health, ModelCard
from tidegate.api.encoders import NONE, Encoders
from tidegate.api.engine_backend import new_request_id
from tidegate.api.metrics import render_counters, render_gauge, render_paths
from tidegate.api.schema import Call
from tidegate.cloud.access import AccessControl
from tidegate.cloud.call_size import least_size, most_size
from tidegate.cloud.language_model import LanguageModel
from tidegate.cloud.link_http_server import LinkHttpServer
from tidegate.cloud.model_settings import AdapterSettings
from tidegate.cloud.pool_report import health_of, models_status, render_engines, render_pool
from tidegate.cloud.pooled_model import Entry, InUse, find
from tidegate.cloud.served_models import Models, Served
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError
from tidegate.link.gateway import Gateway
from tidegate.link.prekeys import ModelOffer
from tidegate.link.transport import PATHS


class CloudBackend:
    """See `tidegate.api.backend.Backend`; `gateway`, `http` and `access` are set once they are."""

    def __init__(self, pool: Models, *, created_s: int, encoders: Encoders = NONE) -> None:
        """Serve what is in `pool`, which is the owner's to keep going, as are `encoders`."""
        self.pool, self._encoders = pool, encoders
        self._created_s = created_s
        self.gateway: Gateway | None = None
        self.http: LinkHttpServer | None = None
        self.access: AccessControl | None = None

    def models(self) -> tuple[ModelCard, ...]:
        """See `Backend.models`: all that make text, in memory or not."""
        cards = []
        for name, entry in self.pool.entries.items():
            if entry.settings.kind != "text":
                continue
            version = entry.current
            card = ModelCard(
                id=name,
                created_s=self._created_s if version is None else version.loaded_s,
                context_tokens=entry.facts.context_tokens,
                state=entry.state,
            )
            adapters = entry.settings.adapters
            cards += [card, *(replace(card, id=one.name, parent=name) for one in adapters)]
        return tuple(cards)

    def offers(self) -> tuple[ModelOffer, ...]:
        """What a gateway tells devices of."""
        return tuple(
            ModelOffer(id=card.id, context_tokens=card.context_tokens) for card in self.models()
        )

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        """See `Backend.answer`."""
        async with aclosing(self.answer_as(call, new_request_id())) as events:
            async for event in events:
                yield event

    async def answer_as(
        self, call: Call, request_id: str, *, join_unread: bool = True
    ) -> AsyncGenerator[AnswerEvent, None]:
        """Answer a call under an id that was given to it elsewhere, wholly by one version.

        Args:
            call: what to answer.
            request_id: 16 bytes in hex.
            join_unread: see `Engine.submit`.
        """
        async with (
            self.hold(call) as held,
            aclosing(held.answer_as(call, request_id, join_unread=join_unread)) as events,
        ):
            async for event in events:
                yield event

    def least_size(self, call: Call) -> CallSize | None:
        """See `tidegate.api.backend.Holding`."""
        entry, adapter = self._find(call.model)
        if entry.current is not None:
            return None
        name = entry.settings.name if adapter is None else adapter.name
        return least_size(call, name, entry.facts.context_tokens)

    @asynccontextmanager
    async def hold(self, call: Call) -> AsyncIterator[HeldModel]:
        """See `tidegate.api.backend.Holding`."""
        self._find(call.model)
        began_s, deadline_ms = time.monotonic(), call.options.deadline_ms
        async with self.pool.use(call.model, deadline_ms=deadline_ms) as used:
            yield HeldModel(self, used, waited_s=time.monotonic() - began_s)

    def _find(self, model: str | None) -> tuple[Entry[Served], AdapterSettings | None]:
        """Whom a call means, which must not be an encoder.

        Raises:
            RequestError: nobody that makes text has that name.
        """
        entry, adapter = find(self.pool.entries, model)
        if entry.settings.kind != "text":
            problem = f"{entry.settings.name!r} makes {entry.settings.kind} and no text"
            raise RequestError("model", problem, status=404)
        return entry, adapter

    async def text_of(self, model: str) -> TextModel:
        """The text side of a model; see `tidegate.api.tokens.TextOf`."""
        async with self.pool.use(model) as used:
            assert isinstance(used.model, LanguageModel), "one of `models`"
            return used.model.engine.text

    def health(self) -> Health:
        """See `Backend.health`: one model without progress is no health."""
        return health_of(self.pool)

    def snapshot(self) -> Health:
        """For a watchdog, see `tidegate.api.lifecycle.Watched`: what `/health` says."""
        now, problem = self.health(), self._encoders.problem()
        return now if problem is None else replace(now, healthy=False, detail=problem)

    async def status(self) -> Mapping[str, object]:
        """See `Backend.status`; `engine` is that of the first model, while it is in memory."""
        models = await models_status(self.pool)
        first = next(iter(models.values()))
        link = None
        if self.gateway is not None:
            link = {
                "connected": self.gateway.connected,
                "broker": self.gateway.status,
                "path": self.gateway.path,
                "http": None if self.http is None else self.http.report(),
                "counters": asdict(self.gateway.counters),
            }
        return {"engine": first["engine"], "models": models, "link": link}

    def metrics(self) -> bytes:
        """See `Backend.metrics`."""
        found = render_engines(self.pool) + render_pool(self.pool)
        if self.access is not None:
            found += self.access.metrics.render()
        if self.gateway is None:
            return found
        text = render_counters("tidegate_link", asdict(self.gateway.counters))
        text += render_paths("tidegate_link", self.gateway.path.split("+"), known=PATHS)
        devices = 0 if self.http is None else len(self.http.hub.handles)
        text += render_gauge("tidegate_link_http_devices", devices, "Devices that read over HTTP.")
        return found + text


class HeldModel:
    """The backend, but for calls, which one version sizes and answers."""

    def __init__(self, backend: CloudBackend, used: InUse[Served], *, waited_s: float) -> None:
        """Serve what `used` is; its call waited for it so long."""
        assert isinstance(used.model, LanguageModel), "encoders are not asked for text"
        self._used, self._model, self._waited_s = used, used.model, waited_s
        self.models, self.health = backend.models, backend.health
        self.status, self.metrics = backend.status, backend.metrics

    async def size_of(self, call: Call) -> CallSize:
        """See `tidegate.api.backend.Sizing`."""
        engine = self._model.engine
        return await most_size(call, self._used.name, engine.text, engine.context_tokens)

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        """See `Backend.answer`."""
        async with aclosing(self.answer_as(call, new_request_id())) as events:
            async for event in events:
                yield event

    def answer_as(
        self, call: Call, request_id: str, *, join_unread: bool = True
    ) -> AsyncGenerator[AnswerEvent, None]:
        """See `CloudBackend.answer_as`."""
        used = self._used
        # Which model it names is what `used` is.
        named = after_waiting(replace(call, model=None), self._waited_s)
        if used.adapter is not None:
            return self._model.answer_adapted(
                named, request_id, used.adapter, used.adapter_version, join_unread=join_unread
            )
        return self._model.answer(named, request_id, join_unread=join_unread)


def after_waiting(call: Call, waited_s: float) -> Call:
    """`call` with what its wait for a model has left of its deadline, at least a millisecond."""
    options = call.options
    if options.deadline_ms is None:
        return call
    left_ms = max(1, options.deadline_ms - round(waited_s * 1000))
    return replace(call, options=replace(options, deadline_ms=left_ms))
