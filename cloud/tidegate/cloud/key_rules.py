"""What an API key may do and what that costs: scopes, models, rates, quotas, prices.

Prices are whole millionths of a currency unit per 1000 tokens, so that a cost is exact in
billionths: tokens times price. The currency is the operator's.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal, cast, get_args

from tidegate.errors import ConfigError

Unit = Literal["requests", "tokens"]
Period = Literal["day", "month"]
Strategy = Literal["bucket", "fixed", "sliding"]
SCOPES: Final = (
    "chat",
    "completions",
    "embeddings",
    "classify",
    "models",
    "metrics",
    "admin",
)
"""`admin` is everything else that the service shows, `/status` among it."""

_TEXT: Final = ("chat", "completions")
_PATHS: Final = {
    "/v1/chat/completions": ("chat",),
    "/v1/completions": ("completions",),
    "/v1/embeddings": ("embeddings",),
    "/classify": ("classify",),
    "/v1/classify": ("classify",),
    "/v1/models": ("models",),
    "/metrics": ("metrics",),
    **{f"{root}{path}": _TEXT for root in ("", "/v1") for path in ("/tokenize", "/detokenize")},
}
_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
_RATE = re.compile(r"([0-9]{1,12})/([0-9]{0,6})(second|minute|hour|day|s)(?:/([a-z]+))?")
MICRO: Final = 1_000_000


def scopes_of(path: str) -> tuple[str, ...]:
    """The scopes of which a key needs one for `path`."""
    if path.startswith("/v1/models/"):
        return ("models",)
    return _PATHS.get(path, ("admin",))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """At most `amount` in `window_s` seconds, by one of three strategies.

    Raises:
        ConfigError: it is not positive, or of no such strategy.
    """

    unit: Unit
    amount: int
    window_s: int
    strategy: Strategy = "bucket"

    def __post_init__(self) -> None:
        if self.amount < 1 or self.window_s < 1:
            raise ConfigError(self.unit, f"{self.amount}/{self.window_s}s", "at least 1 in 1 s")
        if self.strategy not in get_args(Strategy):
            raise ConfigError(self.unit, self.strategy, "by bucket, fixed or sliding")

    @property
    def in_ledger(self) -> bool:
        """Counted with the quotas in one step, so that what is not used returns exactly.

        The others are the `limits` library's, whose sliding window keeps an entry for each unit and
        takes none back: that is for requests.
        """
        return self.strategy == "bucket" or (self.strategy == "sliding" and self.unit == "tokens")

    def __str__(self) -> str:
        spans = {seconds: name for name, seconds in _SECONDS.items()}
        span = spans.get(self.window_s, f"{self.window_s}s")
        return f"{self.amount}/{span}/{self.strategy}"


def parse_rate(unit: Unit, text: str) -> Rate:
    """Read `60/minute`, `1000/10s` or `60/minute/sliding`.

    Raises:
        ConfigError: it is none.
    """
    found = _RATE.fullmatch(text)
    if found is None:
        raise ConfigError(unit, text, "AMOUNT/[N]second|minute|hour|day[/bucket|fixed|sliding]")
    amount, times, span, strategy = found.groups()
    return Rate(
        unit=unit,
        amount=int(amount),
        window_s=int(times or 1) * _SECONDS.get(span, 1),
        strategy=cast(Strategy, strategy or "bucket"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """At most so much in a calendar day or month, UTC."""

    unit: Unit
    period: Period
    amount: int

    def __post_init__(self) -> None:
        if self.amount < 1:
            raise ConfigError(f"{self.unit} per {self.period}", self.amount, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Millionths per 1000 tokens."""

    prompt: int = 0
    completion: int = 0
    cached: int | None = None
    """Prompt tokens that were found in the prefix cache; None: as `prompt`."""

    def cost_nano(self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """The cost in billionths, exact; `cached_tokens` are a part of `prompt_tokens`."""
        cached = self.prompt if self.cached is None else self.cached
        fresh_tokens = prompt_tokens - cached_tokens
        return (
            fresh_tokens * self.prompt
            + cached_tokens * cached
            + completion_tokens * self.completion
        )


def parse_price(name: str, text: str) -> int:
    """Read a decimal price per 1000 tokens into millionths.

    Raises:
        ConfigError: negative, no number, or finer than a millionth.
    """
    try:
        micro = Decimal(text) * MICRO
    except InvalidOperation:
        micro = Decimal(-1)
    if not micro.is_finite() or micro < 0 or micro != micro.to_integral_value() or micro > 1 << 53:
        raise ConfigError(name, text, "a price per 1000 tokens, to six decimals")
    return int(micro)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRules:
    """Everything that a key is bound by. Empty `models` are all models."""

    scopes: tuple[str, ...] = SCOPES
    models: tuple[str, ...] = ()
    rates: tuple[Rate, ...] = ()
    quotas: tuple[Quota, ...] = ()
    prices: Prices = Prices()

    def __post_init__(self) -> None:
        for scope in self.scopes:
            if scope not in SCOPES:
                raise ConfigError("scope", scope, f"one of {', '.join(SCOPES)}")
        if not self.scopes:
            raise ConfigError("scope", "none", f"at least one of {', '.join(SCOPES)}")
        for limits in (
            [rate.unit for rate in self.rates],
            [(quota.unit, quota.period) for quota in self.quotas],
        ):
            if len(set(limits)) < len(limits):
                raise ConfigError("limits", limits, "one of a kind")

    def to_json(self) -> dict[str, Any]:
        """For the store, and for people."""
        return asdict(self)


def rules_from_json(data: dict[str, Any]) -> KeyRules:
    """Undo `KeyRules.to_json`."""
    return KeyRules(
        scopes=tuple(data["scopes"]),
        models=tuple(data["models"]),
        rates=tuple(Rate(**rate) for rate in data["rates"]),
        quotas=tuple(Quota(**quota) for quota in data["quotas"]),
        prices=Prices(**data["prices"]),
    )
