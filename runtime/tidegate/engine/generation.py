"""`Generation`: the engine's mutable state of one request, from submission to its last token.

`0 <= computed < len(tokens)` always: the last token's KV is never needed before its step.
"""

from __future__ import annotations

import secrets

import numpy as np

from tidegate.engine.adapting import kv_tokens
from tidegate.engine.answer import Channel
from tidegate.engine.choosing import Ask, Guide
from tidegate.engine.detokenise import Detokeniser
from tidegate.engine.events import FinishReason, ScoredToken, Timing, TokenLogprob, Usage
from tidegate.engine.executor import Tokens
from tidegate.engine.history import TokenCounter
from tidegate.engine.request import GenerationRequest
from tidegate.engine.sampling import Draw, Sampled
from tidegate.engine.scheduler import Key
from tidegate.engine.stop import StopStrings


class Generation:
    """One request on its way. `key` is its arrival number, unique in the engine's life."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        key: Key,
        text: Detokeniser,
        eos_ids: frozenset[int],
        now_s: float,
        join_unread: bool = True,
        guide: Guide | None = None,
    ) -> None:
        self.request = request
        self.guide = guide
        """Has accepted exactly the tokens of the answer so far."""
        self.key = key
        self.channel = Channel(join_unread=join_unread)
        self.computed = 0
        self.cached_tokens: int | None = None
        """Prompt tokens that were not computed for it; None until it was first scheduled."""
        self.accepted_draft_tokens = self.rejected_draft_tokens = 0
        self.submitted_s = now_s
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self._text = text
        self._chars = 0
        """Characters of the answer so far, before any stop string."""
        params = request.sampling
        self._stops = StopStrings(params.stop)
        self._ends = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else eos_ids
        )
        seed = params.seed
        self._seed = secrets.randbits(64) if seed is None else seed
        self._buffer = np.array(request.prompt, dtype=np.int64)
        self._length = len(request.prompt)
        self._counter: TokenCounter | None = None
        if params.penalises:
            self._counter = TokenCounter(
                self._buffer[: 0 if params.repetition_penalty == 1 else None]
            )

    @property
    def tokens(self) -> Tokens:
        """Prompt and answer so far; a view that later tokens do not change."""
        return self._buffer[: self._length]

    @property
    def kv_tokens(self) -> Tokens:
        """The same, as the KV's books know them."""
        return kv_tokens(self.tokens, self.request.adapter)

    @property
    def length(self) -> int:
        return self._length

    @property
    def generated(self) -> int:
        return self._length - len(self.request.prompt)

    @property
    def rank(self) -> tuple[int, float, Key]:
        """Its place in line, as in `scheduler.Candidate.rank`."""
        deadline_s = self.request.deadline_s
        return self.request.priority, float("inf") if deadline_s is None else deadline_s, self.key

    @property
    def foreseeable(self) -> bool:
        """Whether how its tokens are chosen does not depend on which they are."""
        params = self.request.sampling
        plain = params.logprobs is None and not params.logit_bias
        return plain and self.guide is None and self._counter is None

    def ask(self, draft: Tokens | None = None, *, ahead: int = 0) -> Ask:
        """How its next tokens are to be chosen, those after `draft` among them.

        Args:
            draft: what was guessed.
            ahead: tokens before the one to choose that are not known yet; none unless its tokens
                are `foreseeable`.
        """
        draw = self._draw(self._length + ahead)
        if draft is None:
            return Ask(draw=draw, guide=self.guide)
        return Ask(draw=draw, draft=draft, guide=self.guide)

    def _draw(self, position: int) -> Draw:
        params = self.request.sampling
        ends_from = len(self.request.prompt) + params.min_tokens
        return Draw(
            params=params,
            seed=self._seed,
            position=position,
            history=None if self._counter is None else self._counter.history(),
            ends=tuple(self._ends) if position < ends_from else (),
            ends_from=ends_from,
        )

    def remaining(self, most: int) -> int:
        """Tokens until `max_tokens` or `most`, those of prompt and answer together, end it."""
        return min(self.request.sampling.max_tokens - self.generated, most - self._length)

    def accept(self, sampled: Sampled, *, most: int) -> FinishReason | None:
        """Take a sampled token, pass its text on and say whether the answer is complete.

        Args:
            sampled: the token, as it was chosen.
            most: tokens that prompt and answer may have together.
        """
        token = sampled.token
        self._append(token)
        params = self.request.sampling
        if token in self._ends:
            return self._complete("stop")
        scored = self._scored(sampled)
        text = self._text.push(token)
        self._chars += len(text)
        stopped = False
        if self.generated >= params.min_tokens:
            text, stopped = self._stops.push(text)
        self.channel.add(text, (token,), scored, cut=stopped)
        if stopped:
            return "stop"
        if self.generated >= params.max_tokens or self._length >= most:
            return self._complete("length")
        return None

    def _scored(self, sampled: Sampled) -> tuple[ScoredToken, ...]:
        """The token with its likelihood, if that was asked for."""
        if sampled.logprob is None:
            return ()
        chosen, *top = (
            TokenLogprob(token=token, data=self._text.data(token), logprob=logprob)
            for token, logprob in ((sampled.token, sampled.logprob), *sampled.top)
        )
        return (ScoredToken(chosen=chosen, top=tuple(top), text_offset=self._chars),)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.generated,
            cached_tokens=self.cached_tokens or 0,
            accepted_draft_tokens=self.accepted_draft_tokens,
            rejected_draft_tokens=self.rejected_draft_tokens,
        )

    def timing(self, now_s: float) -> Timing:
        """Where the time went; a stage it never reached counts as lasting until now."""
        scheduled = now_s if self.first_scheduled_s is None else self.first_scheduled_s
        first_token = now_s if self.first_token_s is None else self.first_token_s
        return Timing(
            first_scheduled_s=scheduled - self.submitted_s,
            first_token_s=first_token - self.submitted_s,
            total_s=now_s - self.submitted_s,
            decode_s=now_s - first_token,
        )

    def _append(self, token: int) -> None:
        if self._length == len(self._buffer):
            self._buffer = np.concatenate((self._buffer, np.zeros_like(self._buffer)))
        self._buffer[self._length] = token
        self._length += 1
        if self._counter is not None:
            self._counter.add(token)

    def _complete(self, reason: FinishReason) -> FinishReason:
        """Pass on what was held back; a stop string may still hide in its last characters."""
        text, stopped = self._stops.push(self._text.flush())
        self.channel.add(text if stopped else text + self._stops.flush(), cut=stopped)
        return "stop" if stopped else reason
