"""`charges.Ledger` on Redis: replicas of the service share one, and spend no token twice.

Each operation is one Lua script, which Redis runs alone. A claim is kept under a lease that its
process renews; whoever next asks about the same key returns claims whose lease ran out.
The clock is Redis's own, so the replicas' clocks need not agree. Counts are as durable as that
Redis is: with `appendonly yes` they survive its restart. One Redis, no cluster: the names of the
meters are made inside the scripts.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tidegate.cloud.charges import Charge, Denied, Taken, Used
from tidegate.cloud.sliding import SLOTS
from tidegate.errors import UnavailableError

_log = logging.getLogger(__name__)

LEASE_S: Final = 60.0
"""How long after its process died a claim returns."""
CLOSE_S: Final = 5.0
"""As long as one command may take: a service that ends has more to do."""

_COMMON: Final = """
local prefix, now, id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
if now < 0 then
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local claims, leases = KEYS[1], prefix .. 'leases'
-- A row: meter, kind, unit, most, amount, rate_per_s, lasts_s, window_s.
local SLOTS = {slots}
local function slot_at(row, at) return math.floor(at * SLOTS / row[8]) end
local function slots_of(row)
  -- As `sliding.SlidingWindow`: the slots that count, and their sum.
  local key, oldest = prefix .. 'm:' .. row[1], slot_at(row, now) - SLOTS
  local all, live, sum = redis.call('HGETALL', key), {}, 0
  for i = 1, #all, 2 do
    if tonumber(all[i]) < oldest then
      redis.call('HDEL', key, all[i])
    else
      live[#live + 1] = {tonumber(all[i]), tonumber(all[i + 1])}
      sum = sum + tonumber(all[i + 1])
    end
  end
  table.sort(live, function(a, b) return a[1] < b[1] end)
  return live, sum
end
local function slide(row, amount, at)
  local key, slot = prefix .. 'm:' .. row[1], slot_at(row, at)
  if slot < slot_at(row, now) - SLOTS then return end
  redis.call('HINCRBY', key, string.format('%.0f', slot), string.format('%.0f', amount))
  redis.call('PEXPIRE', key, string.format('%.0f', row[8] * (1 + 1 / SLOTS) * 1000 + 1000))
end
local function level_of(row)
  local key = prefix .. 'm:' .. row[1]
  if row[2] == 'count' then return tonumber(redis.call('GET', key) or '0') end
  if row[2] == 'sliding' then
    local _, sum = slots_of(row)
    return sum
  end
  local state = redis.call('HMGET', key, 'level', 'at')
  if not state[1] then return row[4] end
  local level, at = tonumber(state[1]), tonumber(state[2])
  if now > at then level = math.min(row[4], level + (now - at) * row[6]) end
  return level
end
local function keep_bucket(row, level)
  local key = prefix .. 'm:' .. row[1]
  local at = math.max(now, tonumber(redis.call('HGET', key, 'at') or '0'))
  redis.call('HSET', key, 'level', string.format('%.17g', level),
             'at', string.format('%.17g', at))
  local full_s = math.max(0, row[4] - level) / row[6]
  redis.call('PEXPIRE', key, string.format('%.0f', full_s * 1000 + 1000))
end
local function give_back(row, amount, at)
  local key = prefix .. 'm:' .. row[1]
  if row[2] == 'sliding' then
    slide(row, -amount, at)
  elseif row[2] == 'bucket' then
    keep_bucket(row, math.min(row[4], level_of(row) + amount))
  elseif redis.call('EXISTS', key) == 1 then
    redis.call('INCRBY', key, string.format('%.0f', -amount))
  end
end
local function return_the_dead()
  for _, dead in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 100)) do
    local kept = redis.call('HGET', claims, dead)
    if kept then
      local claim = cjson.decode(kept)
      for _, row in ipairs(claim.rows) do give_back(row, row[5], claim.at) end
    end
    redis.call('HDEL', claims, dead)
    redis.call('ZREM', leases, dead)
  end
end
local function left_of(row)
  local level = level_of(row)
  return row[2] == 'bucket' and level or row[4] - level
end
local function refusal(rows)
  -- The first row that lacks room, as an answer; nil where none does.
  for index, row in ipairs(rows) do
    local left = left_of(row)
    if row[5] > left then
      local wait, lacking = -1, row[5] - left
      if row[2] == 'sliding' then
        wait = row[8]
        for _, one in ipairs(slots_of(row)) do
          lacking = lacking - one[2]
          if lacking <= 0 then
            wait = math.max(0, (one[1] + 1 + SLOTS) * row[8] / SLOTS - now)
            break
          end
        end
      end
      return {index, string.format('%.17g', left), string.format('%.17g', wait)}
    end
  end
end
""".replace("{slots}", str(SLOTS))

_PEEK: Final = (
    _COMMON
    + """
return_the_dead()
return refusal(cjson.decode(ARGV[4])) or {0}
"""
)

_TAKE: Final = (
    _COMMON
    + """
local rows, lease = cjson.decode(ARGV[4]), tonumber(ARGV[5])
return_the_dead()
local again = redis.call('HEXISTS', claims, id) == 1
local refused = not again and refusal(rows)
if refused then return refused end
local answer = {0}
for index, row in ipairs(rows) do
  answer[index + 1] = string.format('%.17g', again and left_of(row) or left_of(row) - row[5])
end
if again then return answer end
for _, row in ipairs(rows) do
  if row[2] == 'bucket' then
    keep_bucket(row, level_of(row) - row[5])
  elseif row[2] == 'sliding' then
    slide(row, row[5], now)
  else
    redis.call('INCRBY', prefix .. 'm:' .. row[1], string.format('%.0f', row[5]))
    redis.call('PEXPIRE', prefix .. 'm:' .. row[1], string.format('%.0f', row[7] * 1000))
  end
end
redis.call('HSET', claims, id, string.format('{"at":%.17g,"rows":%s}', now, ARGV[4]))
redis.call('ZADD', leases, now + lease, id)
return answer
"""
)

_SETTLE: Final = (
    _COMMON
    + """
local used = {requests = tonumber(ARGV[5]), tokens = tonumber(ARGV[6])}
local kept = redis.call('HGET', claims, id)
local done = prefix .. 'done:' .. id
if redis.call('EXISTS', done) == 1 then return 0 end
-- A claim that is no longer kept was returned when its lease ran out: what was used is owed.
local claim = kept and cjson.decode(kept) or {at = now, rows = cjson.decode(ARGV[4])}
for _, row in ipairs(claim.rows) do
  give_back(row, (kept and row[5] or 0) - used[row[3]], claim.at)
end
redis.call('HDEL', claims, id)
redis.call('ZREM', leases, id)
redis.call('SET', done, '1', 'EX', 600)
return 1
"""
)

_RENEW: Final = (
    _COMMON
    + """
return redis.call('ZADD', leases, 'XX', now + tonumber(ARGV[4]), id)
"""
)


class RedisLedger:
    """See the module.

    Args:
        url: `redis://` or `rediss://`, with the password in it if there is one.
        lease_s: see `LEASE_S`.
        now_s: for tests: a clock instead of Redis's own.
        close_s: how long closing may take to settle what is owed.
    """

    def __init__(
        self,
        url: str,
        *,
        lease_s: float = LEASE_S,
        now_s: float | None = None,
        close_s: float = CLOSE_S,
    ) -> None:
        self._redis = Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=5.0)
        self._lease_s, self._close_s = lease_s, close_s
        self.now_s = now_s
        self._take = self._redis.register_script(_TAKE)
        self._peek = self._redis.register_script(_PEEK)
        self._settle = self._redis.register_script(_SETTLE)
        self._renew = self._redis.register_script(_RENEW)
        self._live: dict[tuple[str, str], None] = {}
        self._owed: dict[tuple[str, str], tuple[Sequence[Charge], Used]] = {}
        self._settling: set[asyncio.Task[None]] = set()

    async def take(self, key: str, claim: str, charges: Sequence[Charge]) -> Taken | Denied:
        """See `Ledger.take`."""
        rows = [_row(charge) for charge in charges]
        found = await self._call(self._take, key, claim, json.dumps(rows), self._lease_s)
        where, *numbers = cast("list[Any]", found)
        if where:
            return _denied(where, numbers)
        self._live[key, claim] = None
        return Taken(left=tuple(float(number) for number in numbers))

    async def peek(self, key: str, charges: Sequence[Charge]) -> Denied | None:
        """See `Ledger.peek`."""
        rows = json.dumps([_row(charge) for charge in charges])
        where, *numbers = cast("list[Any]", await self._call(self._peek, key, "", rows))
        return _denied(where, numbers) if where else None

    def settle(self, key: str, claim: str, charges: Sequence[Charge], used: Used) -> None:
        """See `Ledger.settle`; what Redis does not take now is tried again by `run`."""
        self._owed[key, claim] = (charges, used)
        task = asyncio.get_running_loop().create_task(self._try_to_pay(key, claim))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def run(self) -> None:
        """See `Ledger.run`."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                for key, claim in [*self._live]:
                    if (key, claim) in self._owed:
                        await self._pay(key, claim)
                    else:
                        await self._call(self._renew, key, claim, self._lease_s)
            except UnavailableError:
                continue  # each would wait for Redis: until the next round

    async def close(self) -> None:
        """See `Ledger.close`: settle what is left first, while Redis takes it and time is left."""
        with suppress(UnavailableError, TimeoutError):
            async with asyncio.timeout(self._close_s):
                await asyncio.gather(*self._settling)
                for key, claim in [*self._owed]:
                    await self._pay(key, claim)
        if self._owed:
            told = "%d calls could not be settled in Redis: their claims return with their lease"
            _log.warning(told, len(self._owed))
        await self._redis.aclose()

    async def _try_to_pay(self, key: str, claim: str) -> None:
        with suppress(UnavailableError):
            await self._pay(key, claim)

    async def _pay(self, key: str, claim: str) -> None:
        owed = self._owed.get((key, claim))
        if owed is None:
            return
        charges, used = owed
        rows = json.dumps([_row(charge) for charge in charges])
        await self._call(self._settle, key, claim, rows, used.requests, used.tokens)
        self._owed.pop((key, claim), None)
        self._live.pop((key, claim), None)

    async def _call(self, script: Any, key: str, claim: str, *more: object) -> object:
        prefix = f"tidegate:{{{key}}}:"
        now_s = -1.0 if self.now_s is None else self.now_s
        try:
            return await script(keys=[f"{prefix}claims"], args=[prefix, now_s, claim, *more])
        except (RedisError, OSError) as error:
            kind = type(error).__name__  # its message may quote the URL
            raise UnavailableError(f"limits: their Redis cannot be used ({kind})") from None


def _denied(where: Any, numbers: Sequence[Any]) -> Denied:
    wait_s = float(numbers[1])
    return Denied(
        index=int(where) - 1, left=float(numbers[0]), wait_s=None if wait_s < 0 else wait_s
    )


def _row(charge: Charge) -> list[object]:
    return [
        charge.meter,
        charge.kind,
        charge.unit,
        charge.most,
        charge.amount,
        charge.rate_per_s,
        charge.lasts_s,
        charge.window_s,
    ]
