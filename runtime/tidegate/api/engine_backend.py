"""`EngineBackend`: an engine as a `Backend`: the whole service in the cloud, one leg on a device.

A call becomes tokens, tokens become a generation request, and the engine's events pass through
unchanged after one `Routed`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial

from tidegate.api.backend import AnswerEvent, Health, ModelCard, Route, Routed
from tidegate.api.context_policy import fit_call
from tidegate.api.engine_metrics import render_engine
from tidegate.api.schema import Call
from tidegate.api.tools_answer import tool_use, with_calls
from tidegate.api.tools_prompt import encode_with_tools
from tidegate.engine.engine import Engine
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError

_LONG_PROMPT_CHARS = 20_000
"""Longer prompts are tokenised in a thread: below this it takes under about 10 ms."""


async def encode_call(text: TextModel, call: Call) -> tuple[int, ...]:
    """The prompt tokens of a call.

    Raises:
        RequestError: the prompt is empty or longer than what `text` takes.
    """
    if call.kind == "chat":
        if _chars(call) > _LONG_PROMPT_CHARS:
            return await asyncio.to_thread(_encode_chat, text, call)
        return _encode_chat(text, call)
    if isinstance(call.prompt, tuple):
        if len(call.prompt) >= text.context_tokens:
            problem = f"{len(call.prompt)} tokens: must be less than {text.context_tokens}"
            raise RequestError("prompt", problem, status=413)
        return call.prompt
    assert call.prompt is not None, "a completion call has a prompt"
    if len(call.prompt) > _LONG_PROMPT_CHARS:
        return await asyncio.to_thread(text.encode_prompt, call.prompt)
    return text.encode_prompt(call.prompt)


def _chars(call: Call) -> int:
    tools = () if call.tools is None else call.tools.offered
    said = sum(len(one.content) for one in call.messages)
    called = sum(len(made.arguments) for one in call.messages for made in one.tool_calls)
    return said + called + sum(len(tool.parameters) for tool in tools)


def _encode_chat(text: TextModel, call: Call) -> tuple[int, ...]:
    if not call.continue_final_message:
        return encode_with_tools(call.messages, call.tools, text)
    begun = text.encode_continuation(call.messages[-1].content)
    tokens = encode_with_tools(call.messages[:-1], call.tools, text) + begun
    if len(tokens) >= text.context_tokens:
        problem = f"{len(tokens)} tokens: must be less than the context of {text.context_tokens}"
        raise RequestError("messages", problem, status=413)
    return tokens


def new_request_id() -> str:
    """A fresh id: 128 random bits in hex."""
    return secrets.token_hex(16)


def fit_sampling(
    sampling: SamplingParams, prompt_tokens: int, context_tokens: int
) -> SamplingParams:
    """Clamp `max_tokens` to what the context leaves, at least 1, and `min_tokens` with it."""
    most = min(sampling.max_tokens, max(1, context_tokens - prompt_tokens))
    return replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))


def refuse_strays(call: Call) -> None:
    """Refuse in the cloud what should not have left its device; it is then not answered either.

    Raises:
        RequestError: the call was meant to stay on its device.
    """
    if call.options.privacy in ("local", "redact"):
        problem = f"{call.options.privacy!r}: must stay on a device, and this is the cloud"
        raise RequestError("tidegate.privacy", problem, status=422)
    if call.options.route == "edge":
        problem = "'edge': must run on a device, and this is the cloud"
        raise RequestError("tidegate.route", problem, status=422)


class EngineBackend:
    """See `tidegate.api.backend.Backend`. The engine's `run` is the owner's to keep going."""

    def __init__(self, engine: Engine, *, route: Route, created_s: int) -> None:
        """Serve `engine` as its one model; answers say they ran at `route`."""
        self.engine = engine
        self._route = route
        self._created_s = created_s

    def models(self) -> tuple[ModelCard, ...]:
        """See `Backend.models`."""
        engine = self.engine
        return (
            ModelCard(
                id=engine.model_id,
                created_s=self._created_s,
                context_tokens=engine.context_tokens,
            ),
        )

    async def text_of(self, model: str) -> TextModel:
        """The text side of the model; see `tidegate.api.tokens.TextOf`."""
        assert model == self.engine.model_id, "one of `models`"
        return self.engine.text

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        """See `Backend.answer`."""
        async with aclosing(self.answer_as(call, new_request_id())) as events:
            async for event in events:
                yield event

    async def answer_as(
        self,
        call: Call,
        request_id: str,
        *,
        join_unread: bool = True,
        adapter: int | None = None,
    ) -> AsyncGenerator[AnswerEvent, None]:
        """Answer a call under an id that was given to it elsewhere.

        Args:
            call: what to answer.
            request_id: 16 bytes in hex.
            join_unread: see `Engine.submit`.
            adapter: see `GenerationRequest.adapter`.

        Raises:
            RequestError: the call names another model, or its prompt does not fit.
        """
        if call.model not in (None, self.engine.model_id):
            raise RequestError("model", f"must be {self.engine.model_id!r}", status=404)
        if self._route == "cloud":
            refuse_strays(call)
        fitted = await fit_call(
            call,
            partial(encode_call, self.engine.text),
            self.engine.text,
            policy=call.options.context_policy or "error",
            context_tokens=self.engine.context_tokens,
        )
        answer = self.generate(
            fitted.call,
            fitted.prompt,
            request_id,
            "asked here",
            join_unread=join_unread,
            adapter=adapter,
        )
        async with aclosing(answer) as events:
            async for event in events:
                yield fitted.told(event)

    async def generate(
        self,
        call: Call,
        prompt: tuple[int, ...],
        request_id: str,
        reason: str,
        *,
        join_unread: bool = True,
        adapter: int | None = None,
    ) -> AsyncGenerator[AnswerEvent, None]:
        """Answer a call whose prompt is already tokens; `reason` is why it runs here."""
        deadline_ms = call.options.deadline_ms
        use = await tool_use(call.tools, self.engine.text)
        request = GenerationRequest(
            id=RequestId(request_id),
            prompt=prompt,
            sampling=fit_sampling(call.sampling, len(prompt), self.engine.context_tokens),
            priority=call.options.priority,
            deadline_s=None if deadline_ms is None else self.engine.clock() + deadline_ms / 1000,
            reuse=call.options.cache,
            speculation=call.options.speculation,
            constraint=call.constraint if use is None else use.constraint,
            visible=frozenset() if use is None else use.visible,
            adapter=adapter,
        )
        await self.engine.prepare(request.constraint)
        async with aclosing(self.engine.submit(request, join_unread=join_unread)) as answer:
            yield Routed(
                route=self._route,
                reason=reason,
                model=self.engine.model_id,
                request_id=request_id,
            )
            events = answer if use is None else with_calls(answer, use.form, request_id)
            async for event in events:
                yield event

    def health(self) -> Health:
        """See `Backend.health`."""
        now = self.engine.snapshot()
        detail = f"{now.running} running, {now.waiting} waiting"
        if not now.loaded:
            detail += "; the model is unloaded until the next request"
        return Health(healthy=now.healthy, ready=now.accepting, detail=detail)

    async def status(self) -> Mapping[str, object]:
        """See `Backend.status`."""
        now, facts = self.engine.snapshot(), self.engine.executor_facts
        return {
            "model": self.engine.model_id,
            "executor": None if facts is None else asdict(facts),
            "context_tokens": self.engine.context_tokens,
            "running": now.running,
            "waiting": now.waiting,
            "kv_usage": round(now.kv_usage, 4),
            "prefill_tokens_per_s": now.prefill_tokens_per_s,
            "decode_step_s": now.decode_step_s,
            "generated_tokens": now.generated_tokens,
            "draft_tokens": now.draft_tokens,
            "accepted_draft_tokens": now.accepted_draft_tokens,
            "finished": now.finished,
            "failed": now.failed,
            "cancelled": now.cancelled,
            "healthy": now.healthy,
            "loaded": now.loaded,
            "prefix_disk": None
            if now.disk is None
            else {"hit_tokens": now.disk_hit_tokens, **asdict(now.disk)},
        }

    def metrics(self) -> bytes:
        """See `Backend.metrics`."""
        return render_engine(self.engine.model_id, self.engine.snapshot())
