"""`TextBatcher`: calls with texts in, rows of outputs back, many calls sharing each run of a model.

One thread runs the model. While it runs, what arrives waits in a `TextLine`, so a batch grows with
the load; where the limits say so, an idle model waits a moment for others as well. A caller that
leaves, or whose time is over, gives its places up at once. A run that fails is repeated once for
each call of its batch alone, so that one call's texts cost no other its answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

import numpy as np

from tidegate.engine.text_batches import BatchLimits, CallId, TextLine, WaitingText
from tidegate.errors import (
    DeadlineError,
    ExecutionError,
    TidegateError,
    UnavailableError,
    describe_defect,
)
from tidegate.model.packed import Array

CLOSE_S: Final = 10.0
"""A run of 2048 tokens takes seconds; one that takes longer may be stuck."""

_log = logging.getLogger(__name__)

Tokens = Sequence[int]
Run = Callable[[Sequence[Tokens]], Array]
"""Outputs [texts, D] for the token ids of some texts; called from one thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSeen:
    """One run of the model."""

    texts: int
    tokens: int
    padded_tokens: int
    """The longest text times the texts."""
    calls: int
    waited_s: tuple[float, ...]
    """Of each text, from its call's arrival to the run."""
    run_s: float


@dataclass(kw_only=True, slots=True, eq=False)
class _Call:
    """One call in line or in a run, and what it has been given so far."""

    texts: Sequence[Tokens] = field(repr=False)
    done: asyncio.Future[Array]
    left: int
    rows: list[Array | None] = field(repr=False)

    def put(self, index: int, row: Array) -> None:
        """One more of its rows; the last one ends it."""
        self.rows[index] = row
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(np.stack([one for one in self.rows if one is not None]))

    def fail(self, error: TidegateError) -> None:
        """No more rows."""
        if not self.done.done():
            self.done.set_exception(error)


class TextBatcher:
    """See the module. To be used from one event loop; `run` is called in a thread of its own."""

    def __init__(
        self,
        run: Run,
        limits: BatchLimits,
        *,
        name: str,
        saw: Callable[[BatchSeen], None] = lambda seen: None,
    ) -> None:
        """Wait for texts.

        Args:
            run: the model.
            limits: of batches and of the line.
            name: of the model, for its thread and for messages.
            saw: is told of every run that succeeded.
        """
        self._run_model, self._name = run, name
        self.saw = saw
        self._line = TextLine(limits)
        self._calls: dict[CallId, _Call] = {}
        self._next = 0
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"tidegate-{name}")
        self._serving: asyncio.Task[None] | None = None
        self._running_since_s: float | None = None
        self._present_run: Future[Array | TidegateError] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Texts in line."""
        return len(self._line)

    @property
    def busy_s(self) -> float:
        """How long the present run has taken so far; 0 while none runs."""
        since_s = self._running_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    @property
    def idle(self) -> bool:
        """No call is here."""
        return not self._calls

    def check_room(self, texts: int) -> None:
        """Refuse a call before work is put into it.

        Raises:
            CapacityError: the line has no room for so many texts.
            UnavailableError: it is closed.
        """
        if self._closed:
            raise UnavailableError(f"{self._name} is shutting down")
        self._line.check_room(texts)

    async def outputs(self, texts: Sequence[Tokens], *, timeout_s: float | None = None) -> Array:
        """The model's outputs [texts, D], in the order of `texts`, at least one.

        Raises:
            CapacityError: the line has no room for so many texts.
            DeadlineError: they were not there within `timeout_s`.
            ExecutionError: the model failed.
            UnavailableError: it was closed meanwhile.
        """
        assert texts, "a call has texts"
        self.check_room(len(texts))
        loop = asyncio.get_running_loop()
        now_s, number = loop.time(), CallId(self._next)
        deadline_s = None if timeout_s is None else now_s + timeout_s
        self._line.add(number, [len(one) for one in texts], now_s=now_s, deadline_s=deadline_s)
        call = _Call(
            texts=texts, done=loop.create_future(), left=len(texts), rows=[None] * len(texts)
        )
        self._next += 1
        self._calls[number] = call
        self._wake(loop)
        try:
            async with asyncio.timeout_at(deadline_s):
                return await call.done
        except TimeoutError:
            raise DeadlineError(f"{self._name}: not done within {timeout_s:g} s") from None
        finally:
            del self._calls[number]
            self._line.leave(number)

    def close(self, *, timeout_s: float = CLOSE_S) -> bool:
        """End the thread once its run is over; calls still here fail, to be asked again.

        Blocks for a run, but no longer than `timeout_s`; False when the run is still on then, and
        uses its model. Where no call is here, from any thread.
        """
        self._closed = True
        for call in self._calls.values():
            call.fail(UnavailableError(f"{self._name} is shutting down"))
        self._thread.shutdown(wait=False)
        runs = [] if self._present_run is None else [self._present_run]
        return not wait(runs, timeout_s).not_done

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        self._changed.set()
        if self._serving is None or self._serving.done():
            self._serving = loop.create_task(self._serve(loop))

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run batches until nobody waits."""
        while not self._closed and (due_s := self._line.due_s()) is not None:
            if due_s > loop.time():
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(due_s):
                        await self._changed.wait()
                continue
            await self._run_batch(loop, self._line.take())

    async def _run_batch(self, loop: asyncio.AbstractEventLoop, batch: list[WaitingText]) -> None:
        batch = [text for text in batch if text.call in self._calls]
        if not batch or self._closed:
            return
        texts = [self._calls[text.call].texts[text.index] for text in batch]
        began_s, self._running_since_s = loop.time(), time.monotonic()
        try:
            self._present_run = self._thread.submit(self._guarded, texts)
            result = await asyncio.wrap_future(self._present_run, loop=loop)
            self._present_run = None  # it holds its outputs
        finally:
            self._running_since_s = None
        if not isinstance(result, TidegateError):
            for text, row in zip(batch, result, strict=True):
                if (call := self._calls.get(text.call)) is not None:
                    call.put(text.index, row)
            self._tell(_seen(batch, began_s=began_s, ended_s=loop.time()))
            return
        by_call = [list(texts) for _, texts in groupby(sorted(batch, key=_call), key=_call)]
        if len(by_call) > 1:
            for part in by_call:
                await self._run_batch(loop, part)
        elif (alone := self._calls.get(batch[0].call)) is not None:
            self._line.leave(batch[0].call)
            alone.fail(result)

    def _guarded(self, texts: Sequence[Tokens]) -> Array | TidegateError:
        try:
            found = self._run_model(texts)
            assert len(found) == len(texts), "a row per text"
        except TidegateError as error:
            return error
        except Exception as error:  # the boundary to the model's library
            _log.error("%s failed: %s", self._name, describe_defect(error))
            return ExecutionError(f"{self._name} failed: {type(error).__name__}")
        return found

    def _tell(self, seen: BatchSeen) -> None:
        try:
            self.saw(seen)
        except Exception as error:  # who counts must not stop who waits
            _log.error("%s: counting failed: %s", self._name, describe_defect(error))


def _call(text: WaitingText) -> CallId:
    return text.call


def _seen(batch: Sequence[WaitingText], *, began_s: float, ended_s: float) -> BatchSeen:
    return BatchSeen(
        texts=len(batch),
        tokens=sum(text.length for text in batch),
        padded_tokens=len(batch) * max(text.length for text in batch),
        calls=len({text.call for text in batch}),
        waited_s=tuple(began_s - text.arrived_s for text in batch),
        run_s=ended_s - began_s,
    )
