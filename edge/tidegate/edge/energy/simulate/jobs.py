"""What happens to a simulated device: requests, and when the network is gone."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tidegate.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request. `output_tokens` is the truth, which no policy sees."""

    id: str
    kind: str
    """The class whose answers' lengths are predicted together."""
    arrives_s: float
    prompt_tokens: int
    output_tokens: int
    deadline_s: float
    """On the trace's clock, not after the arrival."""
    private: bool = False
    background: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            sizes = (self.prompt_tokens, self.output_tokens)
            raise ConfigError(f"job {self.id}", sizes, "a prompt and an answer of a token or more")
        if not 0 <= self.arrives_s < self.deadline_s:
            times = (self.arrives_s, self.deadline_s)
            raise ConfigError(f"job {self.id}", times, "an arrival from 0 on, and a later deadline")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slack:
    """How long an answer may take: so much, and so many times what it takes alone.

    People read on while an answer grows, so that a long one may take longer; and nobody expects of
    a small board what a large one does.
    """

    fixed_s: float
    times: float

    def of(self, alone_s: float) -> float:
        """Seconds from arrival to deadline."""
        return self.fixed_s + self.times * alone_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One row of a trace file."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(
    path: Path, *, most_prompt: int = 2048, most_output: int = 512
) -> tuple[Arrival, ...]:
    """Read a trace of the form `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure LLM inference).

    Rows beyond the sizes that a device serves are left out: see the reference, section 4.2.

    Raises:
        ConfigError: the file is no such trace, or nothing of it is left.
    """
    rows: list[Arrival] = []
    first: datetime | None = None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                first = first or at
                if 1 <= prompt <= most_prompt and 1 <= output <= most_output:
                    seconds = (at - first).total_seconds()
                    rows.append(Arrival(at_s=seconds, prompt_tokens=prompt, output_tokens=output))
    except OSError as error:
        raise ConfigError("trace", str(path), f"a readable file: {error.strerror}") from None
    except (KeyError, ValueError, TypeError, csv.Error):
        allowed = "a CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens"
        raise ConfigError("trace", str(path), allowed) from None
    if not rows:
        allowed = f"rows of at most {most_prompt} and {most_output} tokens"
        raise ConfigError("trace", str(path), allowed)
    return tuple(sorted(rows, key=lambda row: row.at_s))
