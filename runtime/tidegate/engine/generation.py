"""`Generation`: the engine's mutable state of one request, from submission to its last token.

`0 <= computed < len(tokens)` always: the last token's KV is never needed before its step.
"""

from __future__ import annotations

import secrets

import numpy as np

from tidegate.engine.answer import Channel
from tidegate.engine.choosing import Ask
from tidegate.engine.detokenise import Detokeniser
from tidegate.engine.events import FinishReason, Timing, Usage
from tidegate.engine.executor import Tokens
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
        now_s: float,
        join_unread: bool = True,
    ) -> None:
        self.request = request
        self.key = key
        self.channel = Channel(join_unread=join_unread)
        self.computed = 0
        self.cached_tokens: int | None = None
        """Prompt tokens that were not computed for it; None until it was first scheduled."""
        self.submitted_s = now_s
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self._text = text
        self._stops = StopStrings(request.sampling.stop)
        seed = request.sampling.seed
        self._seed = secrets.randbits(64) if seed is None else seed
        self._buffer = np.array(request.prompt, dtype=np.int64)
        self._length = len(request.prompt)

    @property
    def tokens(self) -> Tokens:
        """Prompt and answer so far; a view that later tokens do not change."""
        return self._buffer[: self._length]

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

    def ask(self, draft: Tokens | None = None) -> Ask:
        """How its next tokens are to be chosen, those after `draft` among them."""
        draw = Draw(params=self.request.sampling, seed=self._seed, position=self._length)
        return Ask(draw=draw) if draft is None else Ask(draw=draw, draft=draft)

    def accept(
        self, sampled: Sampled, *, eos_ids: frozenset[int], most: int
    ) -> FinishReason | None:
        """Take a sampled token, pass its text on and say whether the answer is complete.

        Args:
            sampled: the token, as it was chosen.
            eos_ids: tokens that end an answer; they have no text.
            most: tokens that prompt and answer may have together.
        """
        token = sampled.token
        self._append(token)
        params = self.request.sampling
        if token in eos_ids and not params.ignore_eos:
            return self._complete("stop")
        text, stopped = self._stops.push(self._text.push(token))
        self.channel.add(text, (token,))
        if stopped:
            return "stop"
        if self.generated >= params.max_tokens or self._length >= most:
            return self._complete("length")
        return None

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.generated,
            cached_tokens=self.cached_tokens or 0,
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

    def _complete(self, reason: FinishReason) -> FinishReason:
        """Pass on what was held back; a stop string may still hide in its last characters."""
        text, stopped = self._stops.push(self._text.flush())
        self.channel.add(text if stopped else text + self._stops.flush())
        return "stop" if stopped else reason
