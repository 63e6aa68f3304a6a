"""`AnswerMemory`: what the device remembers of answers, exactly and, if set up, by meaning."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from typing import Final

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.embeddings import Embedder
from tidegate.api.schema import Call, call_to_json
from tidegate.edge.answer_cache import AnswerCache, CachedAnswer, answer_key
from tidegate.edge.semantic_cache import Question, SemanticCache, question
from tidegate.engine.events import Finished, FinishReason, TextDelta, Timing, Usage
from tidegate.engine.request import SamplingParams
from tidegate.errors import TidegateError

_log = logging.getLogger(__name__)

_SHAPELESS: Final = ("model", "stream", "stream_options", "tidegate")
"""Fields of a call that do not change its answer."""


_NOT_COMPARED: Final = "; similar questions were not looked for"

PATIENCE_S: Final = 0.25
"""For a message's vector: hardly noticed before an answer, and enough where nobody else waits.
Others may embed thousands of texts first, and no chat waits for them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recall:
    """What is remembered of a call, and where to keep its answer."""

    hit: CachedAnswer | None = None
    why: str = ""
    """For people: how the kept answer's question compares with this one."""
    key: bytes | None = None
    asked: Question | None = None


class AnswerMemory:
    """The answer caches behind one door. Calls that may rightly give two answers pass it by."""

    def __init__(
        self,
        exact: AnswerCache,
        semantic: SemanticCache | None = None,
        embedder: Embedder | None = None,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Remember in `exact`, and in `semantic` by the vectors of `embedder`, both or neither.

        Args:
            exact: by all that shapes an answer.
            semantic: by what the last message means; None for none.
            embedder: tells that.
            patience_s: longest wait for it.
        """
        assert (semantic is None) == (embedder is None), "meaning needs vectors"
        self._exact, self._semantic, self._embedder = exact, semantic, embedder
        self._patience_s = patience_s

    async def recall(
        self,
        call: Call,
        model: str,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        to_answer: bool = True,
    ) -> Recall:
        """Look a call up.

        Args:
            call: as it was asked.
            model: the id of the one that would answer here.
            prompt: the call's tokens.
            sampling: the call's, fitted to the context.
            to_answer: what is found will be used. Otherwise nothing is embedded, so that only
                identical calls are found, and no entry is kept longer for it.
        """
        if not call.options.cache or call.options.route == "cloud":
            return Recall()
        if call.tools is not None and call.tools.offered:
            return Recall()  # what is kept of an answer is its text
        key = answer_key(model, prompt, sampling, call.constraint)
        if key is None:
            return Recall()
        found = self._exact.get(key) if to_answer else self._exact.peek(key)
        if found is not None:
            return Recall(hit=found, why="identical to an earlier request", key=key)
        if not to_answer:
            why = "none identical" + ("" if self._semantic is None else _NOT_COMPARED)
            return Recall(why=why, key=key)
        asked = await self._question(call, model, sampling)
        if asked is None or self._semantic is None:
            return Recall(key=key)
        similar = self._semantic.get(asked)
        if similar is None:
            return Recall(key=key, asked=asked)
        answer, cosine = similar
        why = f"means the same as an earlier request: {cosine:.3f} alike"
        return Recall(hit=answer, why=why, key=key, asked=asked)

    def keep(self, recall: Recall, text: str, reason: FinishReason, usage: Usage) -> None:
        """Remember the answer to a call that was looked up."""
        if recall.key is not None:
            self._exact.put(recall.key, text, reason, usage)
        if recall.asked is not None and self._semantic is not None:
            self._semantic.put(recall.asked, text, reason, usage)

    def status(self) -> dict[str, object]:
        """JSON for `/status`."""
        told: dict[str, object] = {"entries": len(self._exact), "bytes": self._exact.nbytes}
        if self._semantic is not None:
            told["semantic"] = {
                "entries": len(self._semantic),
                "bytes": self._semantic.nbytes,
                "similarity": self._semantic.similarity,
            }
        return told

    async def _question(self, call: Call, model: str, sampling: SamplingParams) -> Question | None:
        """The last message of a chat as a vector; None when there is none or it has none."""
        if self._embedder is None or not call.messages or call.messages[-1].role != "user":
            return None
        message = call.messages[-1].content
        # Too long to embed, or too busy: the call is answered as if there were no cache.
        try:
            async with asyncio.timeout(self._patience_s):
                embedded = await self._embedder.embed((message,))
        except TimeoutError:
            _log.debug("no embedding for the answer cache within %g s", self._patience_s)
            return None
        except TidegateError as error:
            _log.debug("no embedding for the answer cache: %s", error.code)
            return None
        return question(_scope(call, model, sampling), message, embedded.vectors[0])


def _scope(call: Call, model: str, sampling: SamplingParams) -> bytes:
    """A digest of all but the last message that shapes the answer."""
    body = call_to_json(replace(call, messages=call.messages[:-1]))
    shape = sorted((name, value) for name, value in body.items() if name not in _SHAPELESS)
    # Not the object's own repr, which hides what a caller wrote.
    chosen = sorted(asdict(sampling).items())
    return hashlib.sha256(repr((model, chosen, shape)).encode()).digest()


def replayed(recall: Recall, request_id: str, model: str) -> list[AnswerEvent]:
    """A kept answer as the events of a new one."""
    answer = recall.hit
    assert answer is not None, "there is one to give again"
    return [
        Routed(route="cache", reason=recall.why, model=model, request_id=request_id),
        TextDelta(text=answer.text),
        Finished(
            reason=answer.reason,
            usage=answer.usage,
            timing=Timing(first_scheduled_s=0.0, first_token_s=0.0, total_s=0.0, decode_s=0.0),
        ),
    ]
