"""Prices of models, from a TOML file: what calls by keys without prices of their own cost.

```toml
[models.assistant]
prompt = "0.25"        # per 1000 tokens, in the operator's currency, to six decimals
cached = "0.025"       # of the prompt, those found in the prefix cache; as prompt where left out
completion = "1.00"

[models."*"]           # every other model
prompt = "0.10"
completion = "0.40"
```
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tidegate.cloud.key_rules import Prices, parse_price
from tidegate.errors import ConfigError

OTHERS: Final = "*"
_KINDS: Final = ("prompt", "completion", "cached")
FREE: Final = Prices()


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceTable:
    """Prices by model; what is not in it is free."""

    models: Mapping[str, Prices] = field(default_factory=dict)

    def of(self, model: str, own: Prices) -> Prices:
        """What a call of `model` is charged by: a key's own prices, if it has any, go first."""
        if own != FREE:
            return own
        return self.models.get(model, self.models.get(OTHERS, FREE))


def read_prices(path: Path) -> PriceTable:
    """Read a file as the module's docstring shows one.

    Raises:
        ConfigError: it cannot be read, is no TOML, or has a key or a value that is not allowed.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("prices", str(path), "a TOML file of prices") from error
    models = data.pop("models", None)
    if data or not isinstance(models, dict):
        raise ConfigError("prices", str(path), "tables [models.NAME] and nothing else")
    return PriceTable(models={name: _prices(name, one) for name, one in models.items()})


def _prices(model: str, table: Any) -> Prices:
    if not isinstance(table, dict) or not set(table) <= set(_KINDS):
        raise ConfigError(f"prices of {model}", "...", f"a table of {', '.join(_KINDS)}")
    found = {}
    for kind, value in table.items():
        if not isinstance(value, str):
            # A binary fraction is not what was written.
            raise ConfigError(f"{kind} of {model}", value, 'a price as a string, as "0.25"')
        found[kind] = parse_price(f"{kind} of {model}", value)
    return Prices(**found)
