"""`Client`: the thin blocking transport around `exchange` and `answers`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from tidegate.api.backend import ModelCard
from tidegate.client import exchange
from tidegate.client.answers import Answer, Piece, StreamReader, read_body, read_error
from tidegate.client.exchange import AskOptions, Chat, Exchange, translated
from tidegate.client.explanations import Explanation

_T = TypeVar("_T")


class Client:
    """Asks one Tidegate service, a device or a cloud. Safe to share between threads."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """Prepare; the first request connects.

        Args:
            base_url: of the service, with or without `/v1`.
            api_key: for a service that asks for one.
            timeout_s: the longest silence within an exchange; a whole answer comes after one.
            connect_timeout_s: the longest wait for a connection.

        Raises:
            ConfigError: a setting is wrong.
        """
        to = exchange.connection(
            base_url, api_key=api_key, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s
        )
        self._http = httpx.Client(
            base_url=to.base_url, headers=to.headers, timeout=to.timeout, trust_env=to.trust_env
        )

    def chat(self, said: Chat, **options: Unpack[AskOptions]) -> Answer:
        """Answer a message or a conversation.

        Raises:
            RequestError: the request is wrong, found here or by the server.
            CapacityError: no room; try again after `retry_after_s`.
            UnavailableError: the service cannot be reached or is not ready.
            IdentityError: the key is missing or wrong.
        """
        return self._ask(exchange.chat(said, options, stream=False))

    def complete(self, prompt: str | Sequence[int], **options: Unpack[AskOptions]) -> Answer:
        """Continue a prompt, text or token ids. Raises as `chat` does."""
        return self._ask(exchange.completion(prompt, options, stream=False))

    def stream(self, said: Chat, **options: Unpack[AskOptions]) -> TextStream:
        """Answer a message or a conversation piece by piece. Iterating raises as `chat` does."""
        return TextStream(self._http, exchange.chat(said, options, stream=True))

    def stream_completion(
        self, prompt: str | Sequence[int], **options: Unpack[AskOptions]
    ) -> TextStream:
        """Continue a prompt piece by piece. Iterating raises as `chat` does."""
        return TextStream(self._http, exchange.completion(prompt, options, stream=True))

    def explain(self, said: Chat, **options: Unpack[AskOptions]) -> Explanation:
        """Where `chat` would run now and why; nothing is run.

        Raises what `chat` does, and a RequestError of status 404 where nothing chooses.
        """
        return self._ask(exchange.explanation(said, options))

    def models(self) -> tuple[ModelCard, ...]:
        """What the service serves; the first is its default. Raises as `chat` does."""
        return self._ask(exchange.MODELS)

    def close(self) -> None:
        """Close all connections, and with them the streams that are still open."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, asked: Exchange[_T]) -> _T:
        with translated():
            response = self._http.request(asked.method, asked.path, json=asked.body)
        return read_body(response.status_code, response.content, response.headers, asked.read)


class TextStream:
    """The pieces of an answer as they come. Use it in a `with`, or read it to its end.

    The request is sent by the first iteration. Leaving early cancels the answer on the server.
    """

    def __init__(self, http: httpx.Client, asked: Exchange[Answer]) -> None:
        self._reader = StreamReader()
        # A function of its own: a generator that held `self` would be a cycle, and a loop that is
        # left by `break` would keep its connection until the next garbage collection.
        self._texts = _texts(http, asked, self._reader)

    @property
    def answer(self) -> Answer:
        """The whole answer, with usage, route and timings.

        Raises:
            UnavailableError: the stream was not read to its end.
        """
        return self._reader.finish()

    def __iter__(self) -> Generator[Piece, None, None]:
        return self._texts

    def close(self) -> None:
        """Cancel what has not come yet."""
        self._texts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _texts(
    http: httpx.Client, asked: Exchange[Answer], reader: StreamReader
) -> Generator[Piece, None, None]:
    with translated(), http.stream(asked.method, asked.path, json=asked.body) as response:
        if response.status_code != 200:
            raise read_error(response.status_code, response.read(), response.headers)
        for chunk in response.iter_bytes():
            yield from reader.feed(chunk)
        reader.finish()
