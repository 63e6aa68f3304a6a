"""Fields of OpenAI's and vLLM's calls that are not served: a decision for each, and its reason.

Those that change nothing in an answer are taken and ignored, whatever they hold. Those that would
change it may come only with the value that does not. Anything else is refused by name.
"""

from __future__ import annotations

from typing import Final

from tidegate.api.field_table import Field, Ignored, Neutral

_TRACKING: Final = "For OpenAI's own records of who calls: nothing is recorded of it here."
_CACHING: Final = "How OpenAI caches prompts: here prefixes are cached anyway, see tidegate.cache."

_IGNORED: Final[tuple[Field, ...]] = (
    Ignored(name="user", kind="string", told=_TRACKING),
    Ignored(name="safety_identifier", kind="string", told=_TRACKING),
    Ignored(name="metadata", kind="object", told=_TRACKING),
    Ignored(name="prompt_cache_key", kind="string", told=_CACHING),
    Ignored(name="prompt_cache_retention", kind="string", told=_CACHING),
    Ignored(name="prompt_cache_options", kind="object", told=_CACHING),
)
_NEUTRAL: Final[tuple[Field, ...]] = (
    Neutral(name="store", values=(False,), told="No answer is kept to be fetched later."),
    Neutral(
        name="service_tier",
        values=("auto", "default"),
        told="There is one tier; tidegate.priority says which calls run first.",
    ),
    Neutral(name="moderation", told="Nothing is moderated."),
    Neutral(name="use_beam_search", values=(False,), told="Not served."),
    Neutral(name="length_penalty", values=(1,), told="Belongs to beam search."),
    Neutral(name="skip_special_tokens", values=(True,), told="Special tokens have no text."),
    Neutral(name="spaces_between_special_tokens", values=(True,), told="They have no text."),
    Neutral(name="include_stop_str_in_output", values=(False,), told="Answers end before it."),
    Neutral(name="prompt_logprobs", told="Likelihoods are told of answers only."),
    Neutral(name="return_token_ids", values=(False,), told="See /tokenize."),
    Neutral(name="truncate_prompt_tokens", told="See tidegate.context_policy."),
    Neutral(name="allowed_token_ids", told="See logit_bias and structured_outputs."),
    Neutral(name="bad_words", values=([],), told="See logit_bias."),
)

CHAT_OTHERS: Final[tuple[Field, ...]] = (
    *_IGNORED,
    Ignored(
        name="prediction",
        kind="object",
        told="OpenAI answers faster with it, and the same. Here guesses need no help.",
    ),
    *_NEUTRAL,
    Neutral(name="modalities", values=(["text"],), told="Answers are text."),
    Neutral(name="audio", told="Answers are text."),
    Neutral(name="web_search_options", told="Nothing is searched."),
    Neutral(name="reasoning_effort", values=("none",), told="The prompt alone decides it."),
    Neutral(name="verbosity", values=("medium",), told="The prompt alone decides it."),
    Neutral(name="functions", values=([],), told="The old name of tools."),
    Neutral(name="function_call", values=("auto", "none"), told="The old name of tool_choice."),
    Neutral(name="echo", values=(False,), told="The answer alone is told."),
    Neutral(name="add_special_tokens", values=(False,), told="The chat template adds them."),
    Neutral(name="chat_template", told="It comes with the model."),
    Neutral(name="chat_template_kwargs", values=({},), told="Templates get messages and tools."),
    Neutral(name="documents", values=([],), told="Say them in a message."),
)
COMPLETION_OTHERS: Final[tuple[Field, ...]] = (
    *_IGNORED,
    *_NEUTRAL,
    Neutral(name="echo", values=(False,), told="The answer alone is told."),
    Neutral(name="suffix", values=("",), told="Nothing is filled in between."),
    Neutral(name="add_special_tokens", values=(True,), told="See /tokenize for prompts without."),
)

ONLY_CHATS: Final = tuple(
    (name, "only chats have it")
    for name in (
        *("messages", "tools", "tool_choice", "parallel_tool_calls", "continue_final_message"),
        *("add_generation_prompt", "top_logprobs"),
    )
)
ONLY_COMPLETIONS: Final = (
    ("prompt", "chats have messages instead"),
    ("suffix", "only completions have it"),
    ("input", "chats have messages instead"),
)
