"""The OpenAI-compatible HTTP surface over any `Backend`.

Routes only; `calls` serves a call, `door` is what every request passes. Unknown paths, wrong
methods and everything that goes wrong are answered with OpenAI's error object.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tidegate.api.answers import error_object
from tidegate.api.backend import Backend, ModelCard
from tidegate.api.calls import CallEndpoint
from tidegate.api.classify import ClassifyEndpoint
from tidegate.api.door import RETRY_AFTER_S, Door
from tidegate.api.embeddings import EmbeddingEndpoint
from tidegate.api.encoders import NONE, Encoders
from tidegate.api.explain import explain_routes
from tidegate.api.metrics import CONTENT_TYPE, Metrics
from tidegate.api.models import model_routes
from tidegate.api.openapi import document_route
from tidegate.api.responded import Responded
from tidegate.api.schema import read_chat, read_completion
from tidegate.api.settings import HttpSettings
from tidegate.api.tokens import TextOf, token_routes

__all__ = ["HttpSettings", "create_app"]


def create_app(
    backend: Backend,
    *,
    settings: HttpSettings | None = None,
    metrics: Metrics | None = None,
    encoders: Encoders = NONE,
    texts: TextOf | None = None,
    extra_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """An ASGI app that serves `backend`.

    `metrics` may be shared with another front door of the same backend; `/metrics` shows it, then
    what the backend adds. `encoders` answer `/v1/embeddings` and `/classify`, `texts` `/tokenize`
    and `/detokenize`; a backend that is `Explaining` also `/route/explain`. `extra_routes` come
    last and pass the same door, keys included.
    """
    settings = settings or HttpSettings()
    metrics = metrics or Metrics()
    metrics.expect(card.id for card in backend.models())
    active = asyncio.BoundedSemaphore(settings.max_calls)
    calls = {
        "/v1/chat/completions": read_chat,
        "/v1/completions": read_completion,
    }
    routes: list[BaseRoute] = [
        Route(
            path,
            CallEndpoint(backend, read, settings=settings, metrics=metrics, active=active),
            methods=["POST"],
        )
        for path, read in calls.items()
    ]
    routes += _texts(encoders, settings, metrics, active)
    routes += token_routes(backend, texts, settings=settings, active=active)
    routes += explain_routes(backend, settings=settings, active=active)
    routes.append(document_route())
    routes += _reports(backend, metrics, encoders, status=settings.status)
    counted = Responded(metrics, [*routes, *extra_routes])
    app = Starlette(
        routes=[*routes, *extra_routes],
        middleware=[Middleware(Door, settings=settings, responded=counted)],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect would trust the Host header
    return app


def _texts(
    encoders: Encoders,
    settings: HttpSettings,
    metrics: Metrics,
    active: asyncio.BoundedSemaphore,
) -> list[BaseRoute]:
    """What hands in texts and gets numbers; `/classify` also below the clients' base URL."""
    embed = EmbeddingEndpoint(
        encoders.embedders,
        route=encoders.route,
        settings=settings,
        metrics=metrics,
        active=active,
    )
    classify = ClassifyEndpoint(
        encoders.classifiers,
        route=encoders.route,
        settings=settings,
        metrics=metrics,
        active=active,
    )
    return [
        Route("/v1/embeddings", embed, methods=["POST"]),
        Route("/classify", classify, methods=["POST"]),
        Route("/v1/classify", classify, methods=["POST"]),
    ]


def _reports(
    backend: Backend, metrics: Metrics, encoders: Encoders, *, status: bool
) -> list[BaseRoute]:
    def cards() -> tuple[ModelCard, ...]:
        return (*backend.models(), *encoders.cards())

    async def health(_: Request) -> Response:
        now, problem = backend.health(), encoders.problem()
        healthy = now.healthy and problem is None
        return _probe(healthy, {"healthy": healthy, "detail": problem or now.detail})

    async def ready(_: Request) -> Response:
        now = backend.health()
        fit = now.healthy and now.ready
        return _probe(fit, {"ready": fit, "detail": now.detail})

    async def show_metrics(_: Request) -> Response:
        # Tens of milliseconds for several models, which streams need not wait for.
        shown = await asyncio.to_thread(metrics.show, backend.metrics() + encoders.render())
        return Response(shown, media_type=CONTENT_TYPE)

    async def show_status(_: Request) -> Response:
        shown = {**await backend.status(), "process": _process()}
        return Response(json.dumps(shown), media_type="application/json")

    routes: list[BaseRoute] = [
        *model_routes(cards),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", show_metrics),
    ]
    return [*routes, Route("/status", show_status)] if status else routes


def _process() -> dict[str, int]:
    """What grows when something is forgotten; the task that answers this is one of them."""
    return {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count()}


def _probe(good: bool, body: dict[str, object]) -> Response:
    if good:
        return JSONResponse(body)
    return JSONResponse(body, 503, {"Retry-After": f"{RETRY_AFTER_S:.0f}"})


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    body = error_object(message, status=error.status_code, code=code)
    return JSONResponse(body, error.status_code, error.headers)
