"""`CloudBackend`: a pool of models as one backend, with what the link and the keys counted."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, replace

from tidegate.api.backend import AnswerEvent, Backend, Health, ModelCard
from tidegate.api.encoders import NONE, Encoders
from tidegate.api.engine_backend import encode_call, fit_sampling, new_request_id
from tidegate.api.metrics import render_counters, render_gauge, render_paths
from tidegate.api.schema import Call
from tidegate.cloud.access import AccessControl, CallSize
from tidegate.cloud.language_model import LanguageModel
from tidegate.cloud.link_http_server import LinkHttpServer
from tidegate.cloud.model_pool import ModelPool
from tidegate.cloud.pool_report import health_of, models_status, render_engines, render_pool
from tidegate.cloud.pooled_model import InUse
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError
from tidegate.link.gateway import Gateway
from tidegate.link.prekeys import ModelOffer
from tidegate.link.transport import PATHS

Models = ModelPool[LanguageModel]


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
        """See `Backend.models`: all of them, in memory or not."""
        cards = []
        for name, entry in self.pool.entries.items():
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
        began_s, deadline_ms = time.monotonic(), call.options.deadline_ms
        async with self.pool.use(call.model, deadline_ms=deadline_ms) as used:
            if deadline_ms is not None:  # what waiting for the model has left of it
                left_ms = max(1, deadline_ms - round((time.monotonic() - began_s) * 1000))
                call = replace(call, options=replace(call.options, deadline_ms=left_ms))
            answer = _answer(used, call, request_id, join_unread)
            async with aclosing(answer) as events:
                async for event in events:
                    yield event

    @asynccontextmanager
    async def hold(self, call: Call) -> AsyncIterator[Backend]:
        """See `tidegate.api.backend.Holding`."""
        deadline_ms = call.options.deadline_ms
        async with self.pool.use(call.model, deadline_ms=deadline_ms) as used:
            yield _Held(self, used)

    async def size_of(self, call: Call) -> CallSize:
        """What `call` comes to at most; a prompt that is too long is refused, or cut, later."""
        async with self.pool.use(call.model, deadline_ms=call.options.deadline_ms) as used:
            engine = used.model.engine
            try:
                prompt_tokens = len(await encode_call(engine.text, call))
            except RequestError as error:
                if error.status != 413:
                    raise
                prompt_tokens = engine.context_tokens
            fitted = fit_sampling(call.sampling, prompt_tokens, engine.context_tokens)
            return CallSize(
                model=used.name,
                prompt_tokens=prompt_tokens,
                answer_tokens=call.n * fitted.max_tokens,
            )

    async def text_of(self, model: str) -> TextModel:
        """The text side of a model; see `tidegate.api.tokens.TextOf`."""
        async with self.pool.use(model) as used:
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


class _Held:
    """The backend, but for calls, which one version answers."""

    def __init__(self, backend: CloudBackend, used: InUse[LanguageModel]) -> None:
        self._used = used
        self.models, self.health = backend.models, backend.health
        self.status, self.metrics = backend.status, backend.metrics

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        async with aclosing(_answer(self._used, call, new_request_id(), True)) as events:
            async for event in events:
                yield event


def _answer(
    used: InUse[LanguageModel], call: Call, request_id: str, join_unread: bool
) -> AsyncGenerator[AnswerEvent, None]:
    named = replace(call, model=None)  # which one it names is what `used` is
    if used.adapter is not None:
        return used.model.answer_adapted(
            named, request_id, used.adapter, used.adapter_version, join_unread=join_unread
        )
    return used.model.answer(named, request_id, join_unread=join_unread)
