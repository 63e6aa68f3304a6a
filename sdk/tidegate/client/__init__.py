"""The front door for programs: ask a device or a cloud service, whole or as a stream.

    from tidegate.client import Client

    with Client("http://127.0.0.1:8080") as client:
        answer = client.chat("Why is the sea salty?", max_tokens=64, privacy="local")
        print(answer.text, answer.route, answer.reason)

`AsyncClient` is the same with `await`. Errors are those of `tidegate.errors`; nothing is retried
behind the caller's back, `error.retryable` and `CapacityError.retry_after_s` say what to do.
"""

from tidegate.api.backend import ModelCard
from tidegate.api.schema import Message
from tidegate.client.answers import Answer, Choice, Piece, Timings
from tidegate.client.asynchronous import AsyncClient, AsyncTextStream
from tidegate.client.exchange import AskOptions
from tidegate.client.explanations import Explanation, Pace
from tidegate.client.likelihoods import Likelihood
from tidegate.client.synchronous import Client, TextStream
from tidegate.engine.events import EnergyUse, Usage
from tidegate.errors import (
    CapacityError,
    ConfigError,
    ExecutionError,
    IdentityError,
    RequestError,
    TidegateError,
    UnavailableError,
)

__all__ = [
    "Answer",
    "AskOptions",
    "AsyncClient",
    "AsyncTextStream",
    "CapacityError",
    "Choice",
    "Client",
    "ConfigError",
    "EnergyUse",
    "ExecutionError",
    "Explanation",
    "IdentityError",
    "Likelihood",
    "Message",
    "ModelCard",
    "Pace",
    "Piece",
    "RequestError",
    "TextStream",
    "TidegateError",
    "Timings",
    "UnavailableError",
    "Usage",
]
