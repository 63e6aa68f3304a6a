"""`Grammars`: an engine's compiled grammars, made in a thread of their own, the last ones kept.

A request waits for its grammar before it enters the line, so no other request waits for it. The
tokenizer is read into the matcher's form with the first grammar (0.2 s for 32 000 tokens, 1 s for
152 000), so an engine that nobody asks for structure never pays for it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tidegate.engine.grammar_source import GrammarLimits, grammar_source, place_of, reason_of
from tidegate.engine.guide import GrammarGuide
from tidegate.engine.request import Constraint
from tidegate.engine.text import TextModel
from tidegate.errors import CapacityError, RequestError, UnavailableError

_Key = bytes
_T = TypeVar("_T")
_SYMBOLS: Final = 50_000
"""Of one grammar, a tenth of the library's default."""


class Grammars:
    """Used from one event loop; the compiling happens beside it."""

    def __init__(self, text: TextModel, *, vocab: int, limits: GrammarLimits | None = None) -> None:
        """Keep no grammar yet.

        Args:
            text: whose tokens the grammars are about.
            vocab: the model's, which may be more than the tokenizer's.
            limits: None for the defaults.
        """
        self._text, self._vocab = text, vocab
        self._limits = limits or GrammarLimits()
        self._kept: OrderedDict[_Key, LLMatcher] = OrderedDict()
        self._making: dict[_Key, asyncio.Future[LLMatcher]] = {}
        self._closed = False
        self._tokenizer: LLTokenizer | None = None
        self._reading: asyncio.Future[LLTokenizer] | None = None
        self._current: _Key | None = None
        """What the thread is compiling, or has compiled last."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tidegate-grammar")

    async def prepare(self, constraint: Constraint) -> None:
        """Compile a grammar unless it is here; `guide` may be asked for it right after.

        Raises:
            RequestError: it is wrong, or takes too long; the message says where and why.
            CapacityError: too many others are waiting to be compiled, or one of them takes long.
            UnavailableError: closed, maybe while this one waited.
        """
        key = _key(constraint)
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        await self._read_tokenizer(constraint)
        making = self._making.get(key) or self._begin(key, constraint)
        try:
            async with asyncio.timeout(self._limits.compile_s):
                matcher = await _result(making)
        except TimeoutError:
            if self._current != key:
                raise CapacityError("other grammars take long to compile") from None
            problem = f"did not compile within {self._limits.compile_s:g} s: must be simpler"
            raise RequestError(constraint.name, problem) from None
        self._keep(key, matcher)

    def guide(self, constraint: Constraint) -> GrammarGuide:
        """A fresh guide through a grammar that was just prepared.

        Raises:
            RequestError: the answer's beginning does not follow the grammar.
        """
        base = self._kept.get(_key(constraint))
        assert base is not None, "prepare the constraint first"
        matcher = base.deep_copy()
        if constraint.begun:
            assert self._tokenizer is not None, "it came with the grammar"
            # The matcher reads bytes: these tokens need not be those that were answered.
            begun = self._tokenizer.tokenize_str(constraint.begun)
            if not matcher.consume_tokens(begun):
                problem = "the answer's beginning does not follow it"
                raise RequestError(constraint.name, problem)
        return GrammarGuide(matcher, vocab=self._vocab, name=constraint.name)

    def close(self) -> None:
        """Compile no more: who waits gets an `UnavailableError`. Guides that are out stay good."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, key: _Key, constraint: Constraint) -> asyncio.Future[LLMatcher]:
        if len(self._making) >= self._limits.waiting:
            raise CapacityError(
                f"{len(self._making)} grammars are being compiled already:"
                f" at most {self._limits.waiting} may"
            )
        making = self._start(partial(self._compile, constraint, key))
        self._making[key] = making
        making.add_done_callback(lambda done: self._made(key, done))
        return making

    def _start(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        if self._closed:
            raise _stopped()
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _made(self, key: _Key, done: asyncio.Future[LLMatcher]) -> None:
        del self._making[key]
        if not done.cancelled() and done.exception() is None:
            self._keep(key, done.result())

    def _keep(self, key: _Key, matcher: LLMatcher) -> None:
        self._kept[key] = matcher
        self._kept.move_to_end(key)
        while len(self._kept) > self._limits.kept:
            self._kept.popitem(last=False)

    def _compile(self, constraint: Constraint, key: _Key) -> LLMatcher:
        """In the thread: the matcher at its start, its first mask computed."""
        self._current = key
        source = grammar_source(constraint, self._limits)
        assert self._tokenizer is not None, "it was read before"
        matcher = LLMatcher(
            self._tokenizer, source, log_level=0, limits=LLParserLimits(max_grammar_size=_SYMBOLS)
        )
        if matcher.is_error():
            reason = reason_of(matcher.get_error())
            place = place_of(constraint, reason, LLMatcher.validate_grammar)
            raise RequestError(place, f"cannot be enforced: {reason}")
        matcher.compute_bitmask()  # copies start with what this has learnt
        if matcher.is_error():
            reason = reason_of(matcher.get_error())
            raise RequestError(constraint.name, f"is too complex: {reason}")
        return matcher

    async def _read_tokenizer(self, constraint: Constraint) -> None:
        """Once, however long it takes: that is not the grammar's fault."""
        if self._tokenizer is not None:
            return
        if not self._text.eos_ids:
            problem = "needs a model that can end its answers; this one has no such token"
            raise RequestError(constraint.name, problem)
        if self._reading is None:
            self._reading = self._start(self._read)
        try:
            self._tokenizer = await _result(self._reading)
        except ValueError as error:  # the library's word for a kind that it does not know
            problem = f"this model's tokenizer takes no grammar: {reason_of(str(error))}"
            raise RequestError(constraint.name, problem) from error

    def _read(self) -> LLTokenizer:
        ends = sorted(self._text.eos_ids)
        return LLTokenizer(self._text.tokenizer_json(), n_vocab=self._vocab, eos_token=ends)


async def _result(making: asyncio.Future[_T]) -> _T:
    """What comes of it. Shielded: others may wait for the same one.

    Raises:
        UnavailableError: it was given up, since the engine stops.
    """
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not making.cancelled() or (task is not None and task.cancelling()):
            raise  # it is the caller who is cancelled
        raise _stopped() from None


def _stopped() -> UnavailableError:
    return UnavailableError("the engine has stopped: no grammar is compiled any more")


def _key(constraint: Constraint) -> _Key:
    return hashlib.sha256(f"{constraint.kind}\0{constraint.source}".encode()).digest()
