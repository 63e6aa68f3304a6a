"""Plain English sentences of many shapes and lengths, the same for the same seed."""

from __future__ import annotations

import random

_WHO = (
    "the harbour master", "a nurse on the night shift", "my neighbour", "the youngest engineer",
    "an old farmer", "the committee", "a flock of starlings", "the bus driver", "our landlord",
    "the violin teacher", "two students from Porto", "the bakery across the road",
    "a retired judge", "the satellite", "her grandmother", "the repair crew",
)  # fmt: skip
_DID = (
    "forgot", "repaired", "painted", "measured", "described", "refused", "sold", "discovered",
    "borrowed", "hid", "photographed", "ordered", "questioned", "returned", "admired", "weighed",
)  # fmt: skip
_WHAT = (
    "the tide tables", "a broken pump", "three crates of lemons", "the annual report",
    "an unsigned letter", "the north gate", "a recipe for rye bread", "the x-ray images",
    "a map of the old town", "the price of copper", "a pair of red boots", "the second movement",
    "an allergy to penicillin", "the loan agreement", "a leaking roof", "the goalkeeper's gloves",
)  # fmt: skip
_WHEN = (
    "before sunrise", "during the storm", "in March 1987", "on the last train home",
    "while the kettle boiled", "after the vote was counted", "at the edge of the forest",
    "without telling anyone", "for the first time in years", "under a clear winter sky",
)  # fmt: skip
_WHY = (
    "because the battery was almost empty", "although nobody had asked for it",
    "so that the children could sleep", "since the bridge was closed",
    "even if it cost twice as much", "as soon as the signal came back",
)  # fmt: skip
_ASK = (
    "how do I reset the password of my account", "what is the boiling point of ethanol",
    "which bus goes to the airport", "can dogs eat cooked mushrooms",
    "why does my sourdough not rise", "when was the printing press invented",
    "is it safe to swim after a heavy meal", "where can I renew a passport",
)  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` different sentences: statements, questions, lists and remarks."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_sentence(rng)] = None
    return list(found)


def _sentence(rng: random.Random) -> str:
    who, did, what, when, why, ask = map(rng.choice, (_WHO, _DID, _WHAT, _WHEN, _WHY, _ASK))
    other, thing, number = rng.choice(_WHO), rng.choice(_WHAT), rng.randint(2, 400)
    shapes = (
        f"{who} {did} {what}.",
        f"{who} {did} {what} {when}.",
        f"{when}, {who} {did} {what} {why}.",
        f"{why}, {who} {did} {what} and {other} {rng.choice(_DID)} {thing} {when}.",
        f"did {who} really keep {what}, or was it {other}?",
        f"{ask}?",
        f"{ask}, and does it take more than {number} minutes?",
        f"{what}: {number} euros, {thing}: {2 * number} euros.",
        f"“{what}”, said {who}, “is not what {other} {did} {when}.”",
        f"note {number}: {who}, {other}; {what}; {thing}; {when}.",
        what,
    )
    sentence = rng.choice(shapes)
    return sentence[0].upper() + sentence[1:]
