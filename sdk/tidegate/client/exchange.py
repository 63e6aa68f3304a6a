"""What both clients send: a path, a body and how to read the answer; no I/O.

A body is validated by the server's own reader before it leaves, so a wrong option is the same
`RequestError` with and without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypedDict, TypeVar

import httpx

from tidegate.api.backend import ModelCard
from tidegate.api.schema import (
    ContextPolicy,
    Message,
    Privacy,
    RouteWish,
    read_chat,
    read_completion,
)
from tidegate.client.answers import Answer, read_answer, read_models
from tidegate.client.explanations import Explanation, read_explanation
from tidegate.errors import ConfigError, UnavailableError

T_co = TypeVar("T_co", covariant=True)

Chat = str | Sequence[Message | Mapping[str, object]]
"""One user message, or a whole conversation."""

_EXTENSION: Final = (
    "route",
    "privacy",
    "priority",
    "deadline_ms",
    "cache",
    "speculation",
    "context_policy",
)


class AskOptions(TypedDict, total=False):
    """How to answer; what is left out is the server's choice.

    `temperature` 0 to 2, 0 is greedy; `top_p` 0 to 1; `seed` makes sampling repeatable; `n` asks
    for several answers, see `Answer.choices` and `Piece.choice`; `logit_bias` by token id;
    `logprobs` is true for a chat, with `top_logprobs` up to 20, and a number up to 5 for a
    completion; `response_format` and `structured_outputs` hold the answer to a shape, as in
    docs/structured-output.md;
    `privacy` says whether the request may leave the device and how; `deadline_ms` is when the
    answer stops being useful, in milliseconds from now; `cache` false asks for an answer that is
    neither a kept one nor kept; `context_policy` says what to do with a prompt that is too long.
    """

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    min_p: float | None
    n: int | None
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    ignore_eos: bool | None
    min_tokens: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: bool | int | None
    top_logprobs: int | None
    response_format: Mapping[str, object] | None
    structured_outputs: Mapping[str, object] | None
    route: RouteWish | None
    privacy: Privacy | None
    priority: Literal["interactive", "normal", "background"] | None
    deadline_ms: int | None
    cache: bool | None
    speculation: bool | None
    context_policy: ContextPolicy | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange(Generic[T_co]):
    """One request, and how its answer's JSON is read."""

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, object] | None = field(default=None, repr=False)
    read: Callable[[object], T_co]


MODELS: Final[Exchange[tuple[ModelCard, ...]]] = Exchange(
    method="GET", path="/v1/models", read=read_models
)


def chat(said: Chat, options: AskOptions, *, stream: bool) -> Exchange[Answer]:
    """A chat call.

    Raises:
        RequestError: a message or an option is wrong.
    """
    if isinstance(said, str):
        said = (Message(role="user", content=said),)
    messages = [
        {"role": one.role, "content": one.content} if isinstance(one, Message) else dict(one)
        for one in said
    ]
    body = {"messages": messages, **_body(options, stream=stream)}
    read_chat(body)
    return Exchange(method="POST", path="/v1/chat/completions", body=body, read=read_answer)


def completion(
    prompt: str | Sequence[int], options: AskOptions, *, stream: bool
) -> Exchange[Answer]:
    """A call that continues `prompt`, text or token ids.

    Raises:
        RequestError: the prompt or an option is wrong.
    """
    given = prompt if isinstance(prompt, str) else list(prompt)
    body = {"prompt": given, **_body(options, stream=stream)}
    read_completion(body)
    return Exchange(method="POST", path="/v1/completions", body=body, read=read_answer)


def explanation(said: Chat, options: AskOptions) -> Exchange[Explanation]:
    """The question where a chat call would run.

    Raises:
        RequestError: a message or an option is wrong.
    """
    body = chat(said, options, stream=False).body
    return Exchange(method="POST", path="/route/explain", body=body, read=read_explanation)


def _body(options: AskOptions, *, stream: bool) -> dict[str, object]:
    given = {name: value for name, value in options.items() if value is not None}
    body = {name: value for name, value in given.items() if name not in _EXTENSION}
    if extension := {name: value for name, value in given.items() if name in _EXTENSION}:
        body["tidegate"] = extension
    if bias := options.get("logit_bias"):
        body["logit_bias"] = {str(token): value for token, value in bias.items()}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """Where the service is and how long to wait for it; what both `httpx` clients are made of."""

    base_url: httpx.URL
    headers: Mapping[str, str] = field(repr=False)
    timeout: httpx.Timeout
    trust_env: bool
    """Whether the environment's proxies apply."""


_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def connection(
    base_url: str, *, api_key: str | None, timeout_s: float, connect_timeout_s: float
) -> Connection:
    """Check the settings of a client.

    Raises:
        ConfigError: the address is no http(s) URL, the key no header text, a time not positive.
    """
    for name, value in {"timeout_s": timeout_s, "connect_timeout_s": connect_timeout_s}.items():
        if not value > 0:
            raise ConfigError(name, value, "above 0")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("api_key", "(hidden)", "printable ASCII")
    url = _url(base_url)
    return Connection(
        base_url=url,
        # A proxy of the environment is not asked for this very machine: a private prompt must not
        # take that way, and the proxy would not reach it.
        trust_env=url.host not in _LOOPBACK,
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(timeout_s, connect=connect_timeout_s),
    )


def _url(base_url: str) -> httpx.URL:
    try:
        # People paste the address that OpenAI's client wants.
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("base_url", base_url, "an address like http://127.0.0.1:8080")
    return url


@contextmanager
def translated() -> Iterator[None]:
    """Around everything that `httpx` does, blocking or awaited.

    Raises:
        UnavailableError: instead of any error of the connection.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        raise UnavailableError(f"the service is silent: {type(error).__name__}") from error
    except (httpx.RequestError, httpx.StreamError) as error:
        reason = str(error) or type(error).__name__
        raise UnavailableError(f"the service cannot be reached: {reason}") from error
