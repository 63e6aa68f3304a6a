"""`tidegate.api.admission` for the cloud: keys with limits, usage that is kept, an audit log.

The order is: who it is, what its scopes and models are, its quotas, its rates; after them come the
bounds that everyone shares, the engine's line among them. What is granted is one claim for the most
that the call may use; it is settled when the call is over, whatever ended it. Calls that failed on
our side are counted as requests and cost nothing; those that were not begun are given back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from tidegate.api.admission import Knock
from tidegate.api.settings import Authorise
from tidegate.cloud import quotas
from tidegate.cloud.access_metrics import AccessMetrics
from tidegate.cloud.api_keys import ApiKey, ApiKeyStore, KeyId
from tidegate.cloud.audit import AuditLog
from tidegate.cloud.charges import Ledger, MemoryLedger
from tidegate.cloud.failed_attempts import FailedAttempts
from tidegate.cloud.key_rules import KeyRules, Quota
from tidegate.cloud.limits_of_keys import quota_charge
from tidegate.cloud.link_visit import LinkVisit
from tidegate.cloud.price_table import PriceTable
from tidegate.cloud.usage import DAY_S, FLUSH_ROWS, FLUSH_S, MOST_WAITING, UsageBook
from tidegate.cloud.visits import KeyVisit
from tidegate.errors import CapacityError, TidegateError, UnavailableError, describe_defect
from tidegate.link.effects import InboundRequest

if TYPE_CHECKING:  # an optional library, loaded by who needs it
    from tidegate.cloud.windows import Windows

_log = logging.getLogger(__name__)

_PRUNE_S: Final = 3600.0
"""Between two looks for rows that are too old."""

CLOSE_S: Final = 5.0
"""What is given back on closing may take so long: a service that ends has more to do."""

PLAIN_KEY: Final = KeyId("api-key-file")
"""Stands for the keys of `--api-key-file`, which have all scopes and no limits."""


class AccessControl:
    """See the module. `run` keeps it written down; `close` writes what is left.

    Args:
        keys: looked up on every request.
        usage: what calls used is added to it.
        ledger: counts and buckets.
        audit: None keeps no log.
        windows: makes the counters of fixed and sliding windows, once a key has one.
        plain: the keys that have no rules.
        per_key: metrics carry the names of keys.
        client_keys: a client's certificate stands for the key of its name.
        prices: of models, for keys without prices of their own.
        usage_days: how long rows of usage are kept; None for ever.
        release: called when everything is closed.
        clock: Unix seconds.
    """

    def __init__(
        self,
        *,
        keys: ApiKeyStore,
        usage: UsageBook,
        ledger: Ledger,
        audit: AuditLog | None,
        windows: Callable[[], Windows],
        plain: Authorise | None = None,
        per_key: bool = False,
        client_keys: bool = False,
        prices: PriceTable | None = None,
        usage_days: int | None = None,
        release: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.keys, self.usage, self.ledger, self.audit = keys, usage, ledger, audit
        self.clock = clock
        self.metrics = AccessMetrics(per_key=per_key)
        self.failures = FailedAttempts(clock)
        self._client_keys = client_keys
        self.prices = prices or PriceTable()
        self._usage_days, self._pruned_s = usage_days, 0.0
        self._plain, self._make_windows, self._release = plain, windows, release
        self._windows: Windows | None = None
        self._begun: dict[tuple[KeyId, str], None] = {}
        self._more = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._returns: set[asyncio.Task[None]] = set()

    @property
    def windows(self) -> Windows:
        """Made when the first key needs them."""
        if self._windows is None:
            self._windows = self._make_windows()
        return self._windows

    def knock(self, knock: Knock) -> KeyVisit:
        """See `Admission.knock`."""
        visit = KeyVisit(self, knock)
        visit.enter()
        return visit

    def link_visit(self, request: InboundRequest) -> LinkVisit:
        """Begin to keep book of a device's request."""
        return LinkVisit(self, request)

    def find(self, key: str | None, client: str | None = None) -> ApiKey | None:
        """The record of a key that a request brought; None for one that nobody has.

        Args:
            key: the bearer token.
            client: the name of its certificate, which stands for the key of that name where there
                is no token, if the service was told so.

        Raises:
            CapacityError: the store cannot be read.
        """
        if not key:
            return self.keys.named(client) if self._client_keys and client else None
        found = self.keys.find(key)
        if found is None and self._plain is not None and self._plain(key):
            return ApiKey(
                id=PLAIN_KEY,
                name=PLAIN_KEY,
                created_s=0.0,
                expires_s=None,
                revoked_s=None,
                rules=KeyRules(),
            )
        return found

    def check_room(self) -> None:
        """Refuse calls whose usage could not be kept.

        Raises:
            UnavailableError: the disk has not taken usage for long.
        """
        if self.usage.waiting >= MOST_WAITING:
            raise UnavailableError("usage cannot be written: no further calls are taken")

    def begin_quota(self, key: KeyId, quota: Quota, now_s: float) -> None:
        """Put what earlier runs of the service counted into a count that is new to this one."""
        if not isinstance(self.ledger, MemoryLedger):
            return  # Redis knows
        charge = quota_charge(quota, 0, now_s)
        if (key, charge.meter) in self._begun:
            return
        before = self.usage.since(key, quotas.begin_s(quota.period, now_s))
        count = before.requests if quota.unit == "requests" else before.tokens
        self.ledger.put(key, quota_charge(quota, count, now_s))
        self._begun[key, charge.meter] = None
        while len(self._begun) > 100_000:  # years of days
            del self._begun[next(iter(self._begun))]

    def later(self, work: Awaitable[None]) -> None:
        """Do something that the visit need not wait for; `close` does."""

        async def run() -> None:
            try:
                await work
            except TidegateError as error:
                _log.warning("access: %s", error)

        task = asyncio.get_running_loop().create_task(run())
        self._returns.add(task)
        task.add_done_callback(self._returns.discard)

    def noted(self) -> None:
        """A row or a line was added."""
        if self.usage.waiting >= FLUSH_ROWS:
            self._more.set()

    async def run(self) -> None:
        """Write usage and audit down each second, and keep claims alive. Ends by cancellation."""
        ledger = asyncio.create_task(self.ledger.run())
        try:
            while True:
                try:
                    async with asyncio.timeout(FLUSH_S):
                        await self._more.wait()
                except TimeoutError:
                    pass
                self._more.clear()
                try:
                    await self.flush()
                except Exception as error:  # the boundary of one round: what waits goes on waiting
                    _log.error("access: a round of writing failed with %s", describe_defect(error))
        finally:
            ledger.cancel()
            await asyncio.gather(ledger, return_exceptions=True)

    async def flush(self) -> None:
        """Write what waits, off the event loop."""
        async with self._flushing:
            await asyncio.to_thread(self._write)

    async def close(self) -> None:
        """Write everything down, and settle: other machines may be slow, so that comes after."""
        await self.flush()
        if self._returns:
            _, late = await asyncio.wait(self._returns, timeout=CLOSE_S)
            for one in late:
                one.cancel()
        await self.ledger.close()
        if self._windows is not None:
            await self._windows.close()
        self.usage.close()
        self.keys.close()
        if self._release is not None:
            self._release()

    def _write(self) -> None:
        try:
            self.usage.flush()
        except CapacityError as error:
            _log.error("usage: %s; %d rows wait", error, self.usage.waiting)
        if self.audit is not None:
            self.audit.flush()
        self._prune()

    def _prune(self) -> None:
        now_s = self.clock()
        if self._usage_days is None or now_s - self._pruned_s < _PRUNE_S:
            return
        self._pruned_s = now_s
        try:
            deleted = self.usage.prune(now_s - self._usage_days * DAY_S)
        except CapacityError as error:
            _log.error("usage: old rows could not be deleted: %s", error)
            return
        if deleted:
            _log.info("usage: %d rows older than %d days deleted", deleted, self._usage_days)


@asynccontextmanager
async def written_down(access: AccessControl) -> AsyncIterator[None]:
    """Run `access` while the block runs, and close it then."""
    task = asyncio.create_task(access.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await access.close()
