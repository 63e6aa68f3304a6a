"""What happens to a prompt that is longer than the context: refused, or cut where its caller said.

`truncate_oldest` drops a chat's oldest turns, `truncate_middle` keeps the first one and drops those
after it; a turn is a user's message and all that follows until the next. System messages and the
last turn always stay. Of a raw prompt tokens are cut from the front, or from the middle. What is
kept leaves room for the answer: `max_tokens`, but at most half of the context; a quarter of it when
the caller set none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.schema import Call, ContextPolicy, Message
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError

Encode = Callable[[Call], Awaitable[tuple[int, ...]]]
"""A call to its prompt's tokens. May raise `RequestError` with status 413 for one too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A call whose prompt fits, as tokens, and what was left out for that."""

    call: Call
    prompt: tuple[int, ...] = field(repr=False)
    dropped_messages: int = 0
    dropped_tokens: int = 0

    def told(self, event: AnswerEvent) -> AnswerEvent:
        """An event of its answer; where it says where it runs, also what was left out."""
        if not isinstance(event, Routed) or not (self.dropped_messages or self.dropped_tokens):
            return event
        return replace(
            event,
            dropped_messages=event.dropped_messages + self.dropped_messages,
            dropped_tokens=event.dropped_tokens + self.dropped_tokens,
        )


async def fit_call(
    call: Call, encode: Encode, text: TextModel, *, policy: ContextPolicy, context_tokens: int
) -> Fitted:
    """Make a call fit the context as `policy` says.

    Args:
        call: as it was asked.
        encode: to its prompt's tokens.
        text: the model's text side.
        policy: with `error` the prompt is only encoded; who runs it checks its length.
        context_tokens: prompt and answer together.

    Raises:
        RequestError: the prompt is wrong, or (413) too long although all was cut that may be.
    """
    if policy == "error":
        return Fitted(call=call, prompt=await encode(call))
    room = context_tokens - _reserved(call, context_tokens)
    if call.kind == "chat":
        return await _fit_chat(call, encode, policy, room, context_tokens)
    return await _fit_prompt(call, text, policy, room)


def _reserved(call: Call, context_tokens: int) -> int:
    """Tokens that the answer should have."""
    if call.max_tokens_given:
        return max(1, min(call.sampling.max_tokens, context_tokens // 2))
    return max(1, context_tokens // 4)


def droppable(messages: Sequence[Message], policy: ContextPolicy) -> list[list[int]]:
    """The turns that may go, as indices of their messages, in the order in which they go."""
    turns: list[list[int]] = []
    for index, message in enumerate(messages):
        if message.role == "system":
            continue
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(index)
    return turns[1 if policy == "truncate_middle" else 0 : -1]


async def _fit_chat(
    call: Call, encode: Encode, policy: ContextPolicy, room: int, context_tokens: int
) -> Fitted:
    """Drop as few turns as let the rest fit into `room`, found by halving."""
    turns = droppable(call.messages, policy)

    async def without(count: int) -> Fitted | None:
        gone = {index for turn in turns[:count] for index in turn}
        kept = tuple(one for index, one in enumerate(call.messages) if index not in gone)
        shorter = replace(call, messages=kept)
        prompt = await _encoded(shorter, encode)
        if prompt is None:
            return None
        return Fitted(call=shorter, prompt=prompt, dropped_messages=len(gone))

    def fits(found: Fitted | None) -> bool:
        return found is not None and len(found.prompt) <= room

    whole = await without(0)
    if whole is not None and fits(whole):
        return whole
    too_few, best = 0, await without(len(turns))
    if best is None or len(best.prompt) >= context_tokens:
        raise _too_long(call, turns, best, context_tokens)
    enough = len(turns) if fits(best) else 0
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        found = await without(middle)
        if found is not None and fits(found):
            enough, best = middle, found
        else:
            too_few = middle
    return best


async def _encoded(call: Call, encode: Encode) -> tuple[int, ...] | None:
    """The tokens of a call; None when they are more than anybody would read."""
    try:
        return await encode(call)
    except RequestError as error:
        if error.status != 413:
            raise
        return None


def _too_long(
    call: Call, turns: list[list[int]], left: Fitted | None, context_tokens: int
) -> RequestError:
    gone = sum(map(len, turns))
    kept = f"{len(call.messages) - gone} of {len(call.messages)} messages"
    size = "too many tokens" if left is None else f"{len(left.prompt)} tokens"
    problem = f"the {kept} that may not be dropped are {size}: must be less than {context_tokens}"
    return RequestError("messages", problem, status=413)


async def _fit_prompt(call: Call, text: TextModel, policy: ContextPolicy, room: int) -> Fitted:
    """Cut tokens; what is left is token ids, so it stays with the model that they belong to."""
    assert call.prompt is not None, "a completion call has a prompt"
    if isinstance(call.prompt, tuple):
        tokens, head = call.prompt, 0
    else:
        encode = partial(text.encode_prompt, call.prompt, limited=False)
        tokens = await asyncio.to_thread(encode)
        head = int(tokens[0] == text.bos_id)
    if len(tokens) <= room:
        return Fitted(call=call, prompt=tokens)
    rest = max(1, room - head)
    before = head + rest // 2 if policy == "truncate_middle" else head
    kept = (*tokens[:before], *tokens[len(tokens) - (head + rest - before) :])
    return Fitted(
        call=replace(call, prompt=kept), prompt=kept, dropped_tokens=len(tokens) - len(kept)
    )
