"""The fields of a request that say how tokens are chosen, read from JSON and written back."""

from __future__ import annotations

from typing import Final

from tidegate.api.fields import Fields, kind_of, prose
from tidegate.engine.request import SamplingParams
from tidegate.errors import RequestError

REST_OF_CONTEXT: Final = 2**31 - 1
"""`max_tokens` when the client gave none; who knows the context clamps it, as with any other."""

TOKEN_IDS: Final = 2**31 - 1
"""The largest token id that is read; the engine knows the vocabulary."""

_SEEDS = 2**63 - 1


def read_max_tokens(fields: Fields) -> int | None:
    """The longest answer that was asked for, under its old or its new name."""
    old = fields.integer("max_tokens", 1, REST_OF_CONTEXT)
    new = fields.integer("max_completion_tokens", 1, REST_OF_CONTEXT)
    if old is not None and new is not None and old != new:
        raise RequestError(
            "max_tokens", f"{old}, and max_completion_tokens is {new}: must be the same, or one"
        )
    return old if new is None else new


def read_sampling(fields: Fields, max_tokens: int) -> SamplingParams:
    """How to choose the tokens of an answer of at most `max_tokens`.

    Raises:
        RequestError: a field is wrong; the message names it.
    """
    temperature = fields.number("temperature", 0, 2)
    top_p = fields.number("top_p", 0, 1)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        # Clients of other servers say "off" with 0 or -1.
        top_k=None if fields.raw("top_k") in (0, -1) else fields.integer("top_k", 1, TOKEN_IDS),
        top_p=1.0 if top_p is None else top_p,
        seed=fields.integer("seed", 0, _SEEDS),
        stop=_stop(fields.raw("stop")),
        ignore_eos=fields.flag("ignore_eos") or False,
    )


def sampling_json(sampling: SamplingParams) -> dict[str, object]:
    """The fields that `read_sampling` reads back, None for those that are absent."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "ignore_eos": sampling.ignore_eos or None,
    }


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (prose(value, "stop"),)
    if not isinstance(value, list):
        raise RequestError("stop", f"is {kind_of(value)}: must be a string or a list of strings")
    return tuple(prose(text, f"stop[{index}]") for index, text in enumerate(value))
