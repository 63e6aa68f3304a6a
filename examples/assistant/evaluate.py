"""Exact match per tier: ``python -m assistant.evaluate edge cloud`` from the `examples` folder.

Greedy decoding writes the right answer exactly when each of its tokens, and the end token, is the
most likely one after the prompt and the tokens before it. So one forward pass over prompt and
right answer measures exact match; nothing is decoded. Weights are the exported bfloat16 ones,
computed with in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tokenizers
import torch
from tokenizers import Tokenizer

from .checkpoint import load, write_json
from .corpus import SEEDS, TIERS, Example, Split, generate, long_example
from .domain import SENSORS
from .model import Llama, packed_mask
from .tokenizer import PAD_ID, encode_messages

HERE: Final = Path(__file__).parent
BATCH_TOKENS: Final = 16384
LONG_CONTEXT_SHARE: Final = 2
"""Models are served with about half of their largest context."""


@dataclass(frozen=True, kw_only=True)
class LongTable:
    """A lookup in a table larger than those of the tiers, and the smallest context it needs."""

    title: str
    rows: tuple[int, int]
    context: int
    sensor_counts: tuple[int, ...] = (len(SENSORS),)


LONG_TABLES: Final = (
    LongTable(title="lookup in 40 to 75 rows", rows=(40, 75), context=512),
    LongTable(
        title="lookup in 60 to 100 rows of one sensor",
        rows=(60, 100),
        context=1024,
        sensor_counts=(1,),
    ),
    LongTable(title="lookup in 110 to 160 rows", rows=(110, 160), context=1024),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One measured example and whether the model answers it exactly."""

    example: Example
    right: bool


def encoded(tokenizer: Tokenizer, example: Example) -> tuple[list[int], int]:
    """Return the ids of prompt and right answer, and how many of them are the answer."""
    answer = {"role": "assistant", "content": example.answer}
    ids, learned = encode_messages(tokenizer, [*example.messages, answer])
    return ids, sum(learned)


@torch.no_grad()
def exact_matches(model: Llama, rows: Sequence[tuple[list[int], int]]) -> list[bool]:
    """Return for each row whether greedy decoding after its prompt writes its answer."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), PAD_ID)
    for row, (tokens, _) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    hidden = model.model(ids, packed_mask(torch.ones_like(ids)))
    found = []
    for row, (tokens, answered) in enumerate(rows):
        start = len(tokens) - answered
        likeliest = model.logits(hidden[row, start - 1 : len(tokens) - 1]).argmax(dim=-1)
        found.append(likeliest.tolist() == tokens[start:])
    return found


def measure(model: Llama, tokenizer: Tokenizer, examples: Iterable[Example]) -> list[Outcome]:
    """Measure examples in batches of similar length."""
    rows = [(example, encoded(tokenizer, example)) for example in examples]
    rows.sort(key=lambda row: len(row[1][0]))
    outcomes = []
    while rows:
        batch_rows = max(1, BATCH_TOKENS // len(rows[-1][1][0]))
        batch, rows = rows[-batch_rows:], rows[:-batch_rows]
        found = exact_matches(model, [ids for _, ids in batch])
        outcomes += [
            Outcome(example=example, right=right)
            for (example, _), right in zip(batch, found, strict=True)
        ]
    return outcomes


def shares(outcomes: Iterable[Outcome]) -> dict[str, dict[str, float | int]]:
    """Return the share of right answers by tier, by kind and for held-out combinations."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        example = outcome.example
        names = [f"tier {example.tier}", f"tier {example.tier} {example.kind}", "all"]
        names += [f"tier {example.tier} held out", "held out"] if example.held_out else []
        for name in names:
            groups[name].append(outcome.right)
    return {
        name: {"exact_match": round(sum(right) / len(right), 4), "examples": len(right)}
        for name, right in sorted(groups.items())
    }


def long_examples(split: Split, long: LongTable, *, count: int) -> list[Example]:
    """Return lookups in tables too large for the tiers, from the end of the split's seeds."""
    seeds = SEEDS[split]
    return [
        long_example(seed, split, rows=long.rows, sensor_counts=long.sensor_counts)
        for seed in seeds[-count:]
    ]


def report(name: str, split: Split, *, per_tier: int, long_count: int) -> dict[str, object]:
    """Measure one checkpoint on one split."""
    model, tokenizer = load(HERE / name)
    examples = generate(split, count=per_tier * len(TIERS))
    result: dict[str, object] = dict(shares(measure(model, tokenizer, examples)))
    for long in LONG_TABLES:
        if long.context <= model.shape.context // LONG_CONTEXT_SHARE:
            questions = long_examples(split, long, count=long_count)
            result[long.title] = shares(measure(model, tokenizer, questions))["all"]
    return result


def machine() -> dict[str, object]:
    """Return what the numbers were measured on."""
    model_name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model_name = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model_name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
    }


def main() -> None:
    """Measure the named checkpoints and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--split", choices=tuple(SEEDS), default="test")
    parser.add_argument("--per-tier", type=int, default=500)
    parser.add_argument("--long", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    document = {
        "command": "python -m assistant.evaluate " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "split": arguments.split,
        "models": {
            name: report(
                name, arguments.split, per_tier=arguments.per_tier, long_count=arguments.long
            )
            for name in arguments.names
        },
    }
    if arguments.output:
        write_json(arguments.output, document)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
