"""`tidegate keys api add|list|revoke`: API keys with scopes, limits and prices of their own."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.cloud.api_keys import ApiKey
    from tidegate.cloud.key_rules import KeyRules

_LIFE = re.compile(r"([0-9]{1,6})([smhd])")
_LIFE_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_USUAL_SCOPES = ("chat", "completions", "embeddings", "classify", "models")
_RATE_HELP = "AMOUNT/[N]second|minute|hour|day, then /bucket (default), /fixed or /sliding"


def add_kinds(api: argparse.ArgumentParser) -> None:
    """Declare the commands below `keys api`; none of them prints a plain key."""
    kinds = api.add_subparsers(dest="api_kind", metavar="COMMAND")
    add = kinds.add_parser("add", help="make a key; it is shown once")
    _common(add)
    add.add_argument("name", help="what to call it: letters, digits, dots, dashes, underscores")
    add.add_argument(
        "--scope",
        action="append",
        metavar="SCOPE",
        help="chat, completions, embeddings, classify, models, metrics or admin; repeat it"
        " (default: chat, completions, embeddings, classify, models)",
    )
    add.add_argument("--model", action="append", metavar="ID", help="may use it; repeat (all)")
    add.add_argument("--expires", metavar="90d", help="how long it opens anything (for ever)")
    add.add_argument("--requests", metavar="RATE", help=_RATE_HELP)
    add.add_argument("--tokens", metavar="RATE", help=_RATE_HELP)
    for unit in ("requests", "tokens"):
        for period in ("day", "month"):
            flag = f"--quota-{unit}-{period}"
            add.add_argument(flag, type=int, metavar="N", help=f"{unit} in a UTC {period}")
    for kind in ("prompt", "completion", "cached"):
        add.add_argument(f"--price-{kind}", metavar="X", help=f"of 1000 {kind} tokens")
    _common(kinds.add_parser("list", help="show the keys and their rules, not the keys themselves"))
    revoke = kinds.add_parser("revoke", help="refuse a key from the next request on, for good")
    _common(revoke)
    revoke.add_argument("key", help="its id or name")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state", type=Path, help="the folder that tidegate cloud --state has")
    parser.add_argument("--json", action="store_true", help="for scripts")


def add(args: argparse.Namespace) -> None:
    """Make a key."""
    from tidegate.cloud.api_keys import ApiKeyStore

    rules, now_s = _rules(args), time.time()
    expires_s = None if args.expires is None else now_s + _seconds(args.expires)
    with closing(ApiKeyStore(args.state)) as store:
        record, key = store.add(args.name, rules, now_s=now_s, expires_s=expires_s)
    if args.json:
        _print(record.to_json() | {"key": key})
        return
    print(f"{record.id} {record.name}; the key, shown once:", file=sys.stderr)
    print(key)


def list_keys(args: argparse.Namespace) -> None:
    """Show what is kept of the keys."""
    with closing(_existing(args.state)) as store:
        keys = store.keys()
    if args.json:
        _print([key.to_json() for key in keys])
        return
    for key in keys:
        print(_line(key, time.time()))


def revoke(args: argparse.Namespace) -> None:
    """End a key."""
    with closing(_existing(args.state)) as store:
        record = store.revoke(args.key, now_s=time.time())
    if args.json:
        _print(record.to_json())
        return
    print(f"{record.id} {record.name}: revoked", file=sys.stderr)


def _existing(state: Path) -> Any:
    from tidegate.cloud.api_keys import FILE, ApiKeyStore

    if not (state / FILE).exists():
        raise ConfigError("state", str(state), "a folder with keys (tidegate keys api add)")
    return ApiKeyStore(state)


def _rules(args: argparse.Namespace) -> KeyRules:
    from tidegate.cloud.key_rules import (
        KeyRules,
        Period,
        Prices,
        Quota,
        Unit,
        parse_price,
        parse_rate,
    )

    units, periods = get_args(Unit), get_args(Period)
    rates = [parse_rate(unit, text) for unit in units if (text := getattr(args, unit)) is not None]
    quotas = [
        Quota(unit=unit, period=period, amount=amount)
        for unit in units
        for period in periods
        if (amount := getattr(args, f"quota_{unit}_{period}")) is not None
    ]
    prices = {
        kind: parse_price(f"price-{kind}", text)
        for kind in ("prompt", "completion", "cached")
        if (text := getattr(args, f"price_{kind}")) is not None
    }
    return KeyRules(
        scopes=tuple(args.scope or _USUAL_SCOPES),
        models=tuple(args.model or ()),
        rates=tuple(rates),
        quotas=tuple(quotas),
        prices=Prices(**prices),
    )


def _seconds(text: str) -> float:
    found = _LIFE.fullmatch(text)
    if found is None:
        raise ConfigError("expires", text, "a number with s, m, h or d after it, as 90d")
    return int(found[1]) * float(_LIFE_S[found[2]])


def _line(key: ApiKey, now_s: float) -> str:
    limits = [f"{rate.unit} {rate}" for rate in key.rules.rates]
    limits += [f"{one.unit} {one.amount}/{one.period} quota" for one in key.rules.quotas]
    state = (key.refusal(now_s) or "good").removeprefix("key_")
    scopes, told = ",".join(key.rules.scopes), "; ".join(limits) or "no limits"
    return f"{key.id}  {key.name}  {state}  {scopes}  {told}"


def _print(data: object) -> None:
    print(json.dumps(data, indent=2))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "add": add,
    "list": list_keys,
    "revoke": revoke,
}
