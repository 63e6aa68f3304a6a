"""What an operator may ask of a running service: the tables of such calls."""

from __future__ import annotations

from typing import Final

from tidegate.api.field_table import Choice, Table

RELOAD_MODE: Final = Choice(
    name="mode",
    allowed=("beside", "drain-first"),
    told="How models in memory are replaced; what the settings say if absent.",
)
RELOAD: Final = Table(
    name="ReloadCall", told="The settings are to be read again.", fields=(RELOAD_MODE,)
)
