"""`AsyncClient`: the thin awaiting transport around `exchange` and `answers`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from tidegate.api.backend import ModelCard
from tidegate.client import exchange
from tidegate.client.answers import Answer, Piece, StreamReader, read_body, read_error
from tidegate.client.exchange import AskOptions, Chat, Exchange, translated
from tidegate.client.explanations import Explanation

_T = TypeVar("_T")


class AsyncClient:
    """Asks one Tidegate service from one event loop; see `Client` for what its methods raise."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8080",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """Prepare; the first request connects. The settings are those of `Client`.

        Raises:
            ConfigError: a setting is wrong.
        """
        to = exchange.connection(
            base_url, api_key=api_key, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s
        )
        self._http = httpx.AsyncClient(
            base_url=to.base_url, headers=to.headers, timeout=to.timeout, trust_env=to.trust_env
        )

    async def chat(self, said: Chat, **options: Unpack[AskOptions]) -> Answer:
        """Answer a message or a conversation. Cancelling the task cancels the answer."""
        return await self._ask(exchange.chat(said, options, stream=False))

    async def complete(self, prompt: str | Sequence[int], **options: Unpack[AskOptions]) -> Answer:
        """Continue a prompt, text or token ids."""
        return await self._ask(exchange.completion(prompt, options, stream=False))

    def stream(self, said: Chat, **options: Unpack[AskOptions]) -> AsyncTextStream:
        """Answer a message or a conversation piece by piece."""
        return AsyncTextStream(self._http, exchange.chat(said, options, stream=True))

    def stream_completion(
        self, prompt: str | Sequence[int], **options: Unpack[AskOptions]
    ) -> AsyncTextStream:
        """Continue a prompt piece by piece."""
        return AsyncTextStream(self._http, exchange.completion(prompt, options, stream=True))

    async def explain(self, said: Chat, **options: Unpack[AskOptions]) -> Explanation:
        """Where `chat` would run now and why; nothing is run."""
        return await self._ask(exchange.explanation(said, options))

    async def models(self) -> tuple[ModelCard, ...]:
        """What the service serves; the first is its default."""
        return await self._ask(exchange.MODELS)

    async def aclose(self) -> None:
        """Close all connections, and with them the streams that are still open."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _ask(self, asked: Exchange[_T]) -> _T:
        with translated():
            response = await self._http.request(asked.method, asked.path, json=asked.body)
        return read_body(response.status_code, response.content, response.headers, asked.read)


class AsyncTextStream:
    """The pieces of an answer as they come. Use it in an `async with`, or read it to its end.

    The request is sent by the first iteration. Leaving early cancels the answer on the server.
    """

    def __init__(self, http: httpx.AsyncClient, asked: Exchange[Answer]) -> None:
        self._reader = StreamReader()
        self._texts = _texts(http, asked, self._reader)

    @property
    def answer(self) -> Answer:
        """The whole answer, with usage, route and timings.

        Raises:
            UnavailableError: the stream was not read to its end.
        """
        return self._reader.finish()

    def __aiter__(self) -> AsyncGenerator[Piece, None]:
        return self._texts

    async def aclose(self) -> None:
        """Cancel what has not come yet."""
        await self._texts.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


async def _texts(
    http: httpx.AsyncClient, asked: Exchange[Answer], reader: StreamReader
) -> AsyncGenerator[Piece, None]:
    with translated():
        async with http.stream(asked.method, asked.path, json=asked.body) as response:
            if response.status_code != 200:
                raise read_error(response.status_code, await response.aread(), response.headers)
            async for chunk in response.aiter_bytes():
                for text in reader.feed(chunk):
                    yield text
            reader.finish()
