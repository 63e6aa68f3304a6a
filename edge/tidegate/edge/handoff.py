"""Handing an answer over in its middle: the device's context is full, the cloud goes on.

The cloud gets the call with the text so far as the start of the assistant's turn, so it continues
that very answer and nothing is said twice. Texts are joined, not tokens: the two models may cut
text differently. A stop string that lies across the seam is not seen; a constraint is, because the
cloud's grammar reads the begun text first. What only one model's tokens can say does not go over:
see `names_tokens` and `can_be_continued`.
"""

from __future__ import annotations

from dataclasses import replace

from tidegate.api.schema import Call, Message
from tidegate.engine.events import Finished, TextDelta, Timing, Usage, summed


def was_cut_short(call: Call, end: Finished, context_tokens: int) -> bool:
    """Whether the answer ended for lack of context, not because it was long enough."""
    used = end.usage.prompt_tokens + end.usage.completion_tokens
    wanted = end.usage.completion_tokens < call.sampling.max_tokens
    return end.reason == "length" and used >= context_tokens and wanted


def names_tokens(call: Call) -> bool:
    """Whether a call names token ids, in its prompt or for its answer: they are one model's own."""
    return isinstance(call.prompt, tuple) or bool(call.sampling.named_tokens)


def can_be_continued(call: Call) -> bool:
    """Whether another model can go on with the answer as if it had begun it.

    Penalties on the answer's own tokens would start over, of several answers to one call some
    would be another model's, and half a call to a tool in one model's form is nothing to another.
    """
    if call.tools is not None and call.tools.offered:
        return False
    return not names_tokens(call) and not call.sampling.penalises_answer and call.n == 1


def shifted(delta: TextDelta, chars: int) -> TextDelta:
    """A text of the rest, told as a part of the whole: `chars` came before it."""
    scored = (replace(one, text_offset=one.text_offset + chars) for one in delta.scored)
    return replace(delta, scored=tuple(scored))


def continuation(call: Call, text: str, usage: Usage) -> Call:
    """The call that asks for the rest of an answer that began with `text`."""
    if call.constraint is not None:
        begun = call.constraint.begun + text
        call = replace(call, constraint=replace(call.constraint, begun=begun))
    done = usage.completion_tokens
    sampling = replace(call.sampling, min_tokens=max(0, call.sampling.min_tokens - done))
    if call.max_tokens_given:
        sampling = replace(sampling, max_tokens=sampling.max_tokens - done)
    if call.kind == "completion":
        assert isinstance(call.prompt, str), "token ids never leave the device"
        return replace(call, prompt=call.prompt + text, sampling=sampling)
    messages = call.messages
    if call.continue_final_message:
        *earlier, last = messages
        messages = (*earlier, replace(last, content=last.content + text))
    else:
        messages = (*messages, Message(role="assistant", content=text))
    return replace(call, messages=messages, sampling=sampling, continue_final_message=True)


def joined(first: Finished, rest: Finished) -> Finished:
    """The end of the whole answer. Times count from the first request, rates over both parts."""
    one, other = first.usage, rest.usage
    return Finished(
        reason=rest.reason,
        usage=Usage(
            prompt_tokens=one.prompt_tokens,
            completion_tokens=one.completion_tokens + other.completion_tokens,
            cached_tokens=one.cached_tokens,
            accepted_draft_tokens=one.accepted_draft_tokens + other.accepted_draft_tokens,
            rejected_draft_tokens=one.rejected_draft_tokens + other.rejected_draft_tokens,
        ),
        timing=Timing(
            first_scheduled_s=first.timing.first_scheduled_s,
            first_token_s=first.timing.first_token_s,
            total_s=first.timing.total_s + rest.timing.total_s,
            decode_s=first.timing.decode_s + rest.timing.decode_s,
        ),
        energy=summed((first.energy, rest.energy)),
    )
