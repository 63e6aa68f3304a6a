"""`/v1/models`: which models a caller may name, and the check of the one that a call names.

A key that may use only some models is shown only those; where keys have no rules all are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from tidegate.api.admission import visit_of
from tidegate.api.answers import error_object, models_object
from tidegate.api.backend import ModelCard
from tidegate.errors import RequestError

Cards = Callable[[], Sequence[ModelCard]]


def cards_for(scope: Scope, cards: Sequence[ModelCard]) -> tuple[ModelCard, ...]:
    """Those of `cards` that whoever makes this request may use."""
    visit = visit_of(scope)
    return tuple(card for card in cards if visit is None or visit.may_use(card.id))


def chosen_model(model: str | None, cards: Sequence[ModelCard], scope: Scope) -> str:
    """The id of the model that a call names; of a call that names none, the first it may use.

    Args:
        model: as the call has it.
        cards: at least one.
        scope: of the request.

    Raises:
        RequestError: 404, it is not served; lists what the caller may use.
    """
    if model is None:
        return (cards_for(scope, cards) or cards)[0].id
    if any(card.id == model for card in cards):
        return model
    names = ", ".join(card.id for card in cards_for(scope, cards)) or "none"
    raise RequestError("model", f"{model[:64]!r} is not served: must be {names}", status=404)


def model_routes(cards: Cards) -> list[BaseRoute]:
    """The list, and each of its entries."""

    async def models(request: Request) -> Response:
        return JSONResponse(models_object(cards_for(request.scope, cards())))

    async def model(request: Request) -> Response:
        wanted = request.path_params["model"]
        for card in cards_for(request.scope, cards()):
            if card.id == wanted:
                listed = models_object((card,))["data"]
                assert isinstance(listed, list)
                return JSONResponse(listed[0])
        body = error_object("no such model", status=404, code="model_not_found", param="model")
        return JSONResponse(body, 404)

    return [Route("/v1/models", models), Route("/v1/models/{model:path}", model)]
