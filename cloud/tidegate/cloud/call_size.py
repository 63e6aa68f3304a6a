"""How much a call comes to: at most, once its prompt is tokens, and at least, before that. Pure."""

from __future__ import annotations

from tidegate.api.admission import CallSize
from tidegate.api.engine_backend import encode_call, fit_sampling
from tidegate.api.schema import Call
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError


async def most_size(call: Call, model: str, text: TextModel, context_tokens: int) -> CallSize:
    """What `call` comes to at most; a prompt that is too long is refused, or cut, later.

    Args:
        call: whose prompt is to be counted.
        model: the name that it is counted under.
        text: tokenises.
        context_tokens: of the model.

    Raises:
        RequestError: the prompt is empty.
    """
    try:
        prompt_tokens = len(await encode_call(text, call))
    except RequestError as error:
        if error.status != 413:
            raise
        prompt_tokens = context_tokens
    return _size(call, model, prompt_tokens, context_tokens)


def least_size(call: Call, model: str, context_tokens: int) -> CallSize:
    """No more tokens than `most_size` will say, whatever the tokenizer makes of the prompt.

    What a call comes to grows with its prompt while all of `max_tokens` fits behind it; then `n`
    answers get shorter by a token each, down to one. So it is least at one of the two ends.
    """
    shortest = len(call.prompt) if isinstance(call.prompt, tuple) else 1
    shortest = min(shortest, context_tokens)
    ends = (shortest, max(shortest, context_tokens - 1))
    sizes = [_size(call, model, prompt_tokens, context_tokens) for prompt_tokens in ends]
    return min(sizes, key=lambda size: size.tokens)


def _size(call: Call, model: str, prompt_tokens: int, context_tokens: int) -> CallSize:
    fitted = fit_sampling(call.sampling, prompt_tokens, context_tokens)
    return CallSize(
        model=model, prompt_tokens=prompt_tokens, answer_tokens=call.n * fitted.max_tokens
    )
