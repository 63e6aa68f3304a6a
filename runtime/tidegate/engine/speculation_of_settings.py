"""Who guesses tokens for an engine, as its settings say."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.engine.drafts import Drafter, GrammarDrafter, PaidDrafter
from tidegate.engine.drafts_lookup import LookupDrafter
from tidegate.engine.settings import EngineSettings
from tidegate.engine.speculation import Speculator


def speculator_for(
    step_rows: int,
    settings: EngineSettings,
    *,
    eos_ids: frozenset[int],
    drafters: Sequence[Drafter] | None,
    paid: PaidDrafter | None,
) -> Speculator | None:
    """The speculator of an engine; None where nothing is to be guessed.

    Args:
        step_rows: requests that run at once.
        settings: of the engine.
        eos_ids: of its model.
        drafters: the first with an idea guesses; None for what a grammar leaves no choice about
            and prompt lookup.
        paid: guesses at a price where they have no idea.
    """
    if not settings.speculation:
        return None
    most_requests = 2 * step_rows
    if drafters is None:
        lookup = LookupDrafter(most_requests=most_requests, share=settings.shared_guesses)
        drafters = (GrammarDrafter(), lookup)
    return Speculator(drafters, most_requests=most_requests, eos_ids=eos_ids, paid=paid)
