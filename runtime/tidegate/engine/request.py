"""What the engine is asked: prompt tokens, how to sample, when it matters.

Everything is validated on construction, so the loop never meets a request it cannot run. Times are
seconds on the engine's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Literal, NewType

from tidegate.errors import RequestError

RequestId = NewType("RequestId", str)


class Priority(IntEnum):
    """Lower runs first."""

    INTERACTIVE = 0
    NORMAL = 1
    BACKGROUND = 2


MOST_TOP_LOGPROBS: Final = 20
MOST_BIASED: Final = 300
"""Tokens with a bias; every step of the request adds them all."""
MOST_STOP_IDS: Final = 64
MOST_STOPS: Final = 16
STOP_CHARS: Final = 256


def _between(field_name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestError(field_name, f"{value!r}: must be between {low:g} and {high:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when the answer ends.

    `temperature` 0 is greedy. `top_k` None, `top_p` 1 and `min_p` 0 keep the whole vocabulary. The
    same seed gives the same tokens whatever else is in the batch; None draws one when the request
    starts. In which order they apply: `tidegate.engine.sampling`.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one are never chosen."""
    seed: int | None = None
    stop: tuple[str, ...] = field(default=(), repr=False)
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer as the model's own do; they have no text. Also with ignore_eos."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """No token or stop string ends the answer before it has so many tokens."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer holds already."""
    frequency_penalty: float = 0.0
    """The same, as often as the answer holds it."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or answer: positive ones are divided by it, others multiplied."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), ids ascending."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told with each token; None: no likelihoods at all."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError("max_tokens", f"{self.max_tokens!r}: must be at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            problem = f"{self.min_tokens}: must be between 0 and max_tokens, {self.max_tokens}"
            raise RequestError("min_tokens", problem)
        _between("temperature", self.temperature, 0, 2)
        _between("top_p", self.top_p, 0, 1)
        _between("min_p", self.min_p, 0, 1)
        if self.top_k is not None and self.top_k < 1:
            raise RequestError("top_k", f"{self.top_k!r}: must be at least 1, or absent")
        longest = max(map(len, self.stop), default=1)
        if len(self.stop) > MOST_STOPS or "" in self.stop or longest > STOP_CHARS:
            problem = f"must be at most {MOST_STOPS} strings of 1 to {STOP_CHARS} characters"
            raise RequestError("stop", problem)
        self._check_penalties()
        if self.logprobs is not None:
            _between("logprobs", self.logprobs, 0, MOST_TOP_LOGPROBS)

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change how the next is chosen."""
        return self.repetition_penalty != 1 or self.penalises_answer

    @property
    def penalises_answer(self) -> bool:
        """Whether the tokens of the answer alone do."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def named_tokens(self) -> tuple[int, ...]:
        """Token ids that the request names: they mean something to one model's tokenizer only."""
        return (*(token for token, _ in self.logit_bias), *self.stop_token_ids)

    def check_tokens(self, vocab: int) -> None:
        """Check the named tokens, once it is known which model is meant.

        Raises:
            RequestError: the model has only `vocab` tokens.
        """
        allowed = f"must be a token id from 0 to {vocab - 1}, the model's"
        for token, _ in self.logit_bias:
            if not 0 <= token < vocab:
                raise RequestError("logit_bias", f"{token}: {allowed}")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab:
                raise RequestError("stop_token_ids", f"{token}: {allowed}")

    def _check_penalties(self) -> None:
        _between("presence_penalty", self.presence_penalty, -2, 2)
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 10)
        if len(self.stop_token_ids) > MOST_STOP_IDS:
            problem = f"{len(self.stop_token_ids)} ids: must be at most {MOST_STOP_IDS}"
            raise RequestError("stop_token_ids", problem)
        if len(self.logit_bias) > MOST_BIASED:
            problem = f"{len(self.logit_bias)} tokens: must be at most {MOST_BIASED}"
            raise RequestError("logit_bias", problem)
        for token, bias in self.logit_bias:
            _between(f"logit_bias.{token}", bias, -100, 100)
        ids = [token for token, _ in self.logit_bias]
        assert ids == sorted(set(ids)), "one order for all that mean the same"


ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """What an answer must look like, whole; `engine.grammar` compiles it and says what is wrong."""

    kind: ConstraintKind
    source: str = field(default="", repr=False)
    """A JSON schema or a list of choices, both as JSON; a regular expression; a Lark grammar."""
    begun: str = field(default="", repr=False)
    """The answer's beginning when it was given elsewhere; it is a part of what is constrained."""
    name: str = field(default="constraint", compare=False)
    """The field of the request that asked for it, for errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt to continue. `prompt` holds token ids, so a hand-off can be token exact."""

    id: RequestId
    prompt: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None
    """When the answer stops being useful, on the engine's clock; orders the queue, ends nothing."""
    reuse: bool = True
    """Computed KV of earlier requests may serve this one, and its own later ones."""
    constraint: Constraint | None = None
    visible: frozenset[int] = frozenset()
    """Special tokens that are text in the answer."""
    speculation: bool = True
    """Its tokens may be guessed ahead; they are the same tokens either way."""
    adapter: int | None = None
    """The number of an adapter that the executor has; None for the model itself."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("prompt", "is empty: must hold at least one token")
        if self.constraint is not None:
            self._check_ends(self.constraint)

    def _check_ends(self, constraint: Constraint) -> None:
        """The grammar says where the answer ends; nothing else may forbid it."""
        if self.sampling.ignore_eos:
            raise RequestError("ignore_eos", f"true: must be false with {constraint.name}")
        if self.sampling.min_tokens:
            problem = f"{self.sampling.min_tokens}: must be 0 with {constraint.name}"
            raise RequestError("min_tokens", problem)
