"""What sizes and times of an answer's messages tell a broker about its topic.

Answers on six topics are made by a Markov chain over a short text of each, with the pace of a small
model, and go through the gateway's own session and seal on a virtual clock. A classifier that sees
only the size and time of every message guesses the topic: logistic regression over counts, moments,
quantiles and a histogram, five-fold cross-validation, 95 % Wilson interval. Columns:

    off        every token leaves at once, in a message of its own size
    padded     every token leaves at once, in a multiple of 64 bytes
    tick       the default: 64 bytes and a beat of 40 ms
    constant   one size on every beat while the answer runs

Rows: answers of all topics equally long on average, and with lengths as topics have them, which no
padding short of a fixed length hides. Chance is one in six. Prompts are left out: their sizes are
in buckets, see `docs/security.md`. So is guessing ahead, whose bursts tell about the text too where
answers leave at once.

    python benchmarks/link/privacy.py --keep benchmarks/results/link-privacy.json
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from link.children import import_paths  # noqa: E402

sys.path[1:1] = import_paths()

import numpy as np  # noqa: E402
from link.topics import TOPICS  # noqa: E402
from linklab import new_peers  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from report import report  # noqa: E402

from tidegate.api.wire import write_event  # noqa: E402
from tidegate.engine.events import TextDelta  # noqa: E402
from tidegate.link.chunks import LENGTH_BYTES, padded_chunk_bytes  # noqa: E402
from tidegate.link.envelope import GatewayAttempt  # noqa: E402
from tidegate.link.gateway_pacing import at_least_bytes  # noqa: E402
from tidegate.link.gateway_session import GatewaySession  # noqa: E402
from tidegate.link.messages import Control, ControlKind, Status  # noqa: E402
from tidegate.link.timing import Pacing, Timing  # noqa: E402

Array = NDArray[np.float64]
COLUMNS: dict[str, tuple[Pacing, bool]] = {
    "off": ("off", False),
    "padded": ("off", True),
    "tick": ("tick", True),
    "constant": ("constant", True),
}
"""Pacing, and whether sizes are padded."""
TOKEN_S = 0.03
"""A small model on one GPU under some load; gamma distributed around it."""
MEAN_TOKENS = 100
FOLDS = 5
_TOKEN = re.compile(r"\s?\w{1,10}|\s?[^\w\s]|\s")


@dataclass(frozen=True, slots=True)
class Seen:
    """One message as a broker sees it."""

    at_s: float
    size_bytes: int


def tokens_of(text: str) -> list[str]:
    """Pieces of at most ten letters with the space before them, as tokenisers make them."""
    return _TOKEN.findall(text)


def answer(topic: str, length: int, rng: random.Random) -> list[str]:
    """A walk along the topic's text: after a token comes what came after it somewhere."""
    tokens = tokens_of(TOPICS[topic].text)
    follow: dict[str, list[int]] = {}
    for number, token in enumerate(tokens):
        follow.setdefault(token, []).append((number + 1) % len(tokens))
    at = rng.randrange(len(tokens))
    said = []
    for _ in range(length):
        said.append(tokens[at])
        at = rng.choice(follow[tokens[at]])
    return said


def sent(said: Sequence[str], timing: Timing, rng: random.Random) -> list[tuple[float, bytes, int]]:
    """When each chunk leaves, what it says, and what it is padded to beyond its multiple of 64."""
    now_s = rng.uniform(0.0, 1.0)
    session = GatewaySession(timing=timing, now_s=now_s, stored=[])
    out: list[tuple[float, bytes, int]] = []
    due = []
    for number, text in enumerate(said):
        now_s += rng.gammavariate(4.0, TOKEN_S / 4.0)
        due.append((now_s, write_event(TextDelta(text=text, tokens=(1000 + number,)))))
    end_s = now_s + 0.001

    def poll(at_s: float) -> bool:
        over = False
        for bundle in session.poll(at_s):
            data = bundle.encode()
            out.append((at_s, data, at_least_bytes(len(data), timing)))
            over = over or bundle.status is not Status.MORE
            control = Control(kind=ControlKind.ACK, have=bundle.end, credit=32, seen=len(out))
            session.on_ack(at_s, control)
        return over

    poll(due[0][0] - TOKEN_S)
    while due or end_s:
        wake_s = session.next_wakeup_s()
        next_s = due[0][0] if due else end_s
        if wake_s < next_s:
            poll(wake_s)
            continue
        if due:
            session.produce(due.pop(0)[1])
        else:
            session.finish(Status.COMPLETE, "")
            end_s = 0.0
        over = poll(next_s)
    while not over:
        over = poll(session.next_wakeup_s())
    return out


def observe(
    said: Sequence[str], column: str, keys: GatewayAttempt, rng: random.Random
) -> list[Seen]:
    """The messages of one answer; sizes are those of really sealed messages."""
    pacing, padded = COLUMNS[column]
    timing = Timing(pacing=pacing)
    seen = []
    for at_s, data, least_bytes in sent(said, timing, rng):
        message = keys.seal_response(data, final=False, at_least_bytes=least_bytes)
        size_bytes = len(message)
        if not padded:
            content_bytes = LENGTH_BYTES + len(data)
            size_bytes -= padded_chunk_bytes(content_bytes) - content_bytes
        seen.append(Seen(at_s, size_bytes))
    return seen


def features(seen: Sequence[Seen]) -> list[float]:
    """Numbers about sizes and times; the same list whatever the column."""
    sizes = np.array([one.size_bytes for one in seen], dtype=float)
    times = np.array([one.at_s for one in seen])
    gaps = np.diff(times) if len(seen) > 1 else np.zeros(1)
    steps = np.diff(sizes) if len(seen) > 1 else np.zeros(1)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    histogram, _ = np.histogram(sizes, bins=np.arange(120, 1300, 4))
    return [
        float(len(seen)),
        float(sizes.sum()),
        float(times[-1] - times[0]),
        float(sizes.mean()),
        float(sizes.std()),
        float(gaps.mean()),
        float(gaps.std()),
        float(np.abs(steps).mean()),
        float((steps == 0).mean()),
        float((sizes[1:] * sizes[:-1]).mean()) if len(seen) > 1 else 0.0,
        *map(float, np.quantile(sizes, shares)),
        *map(float, np.quantile(gaps, shares)),
        *map(float, histogram / len(seen)),
    ]


def fit(x: Array, y: NDArray[np.int64], classes: int) -> tuple[Array, Array, Array]:
    """Multinomial logistic regression by gradient descent; weights, mean and scale."""
    mean, scale = x.mean(0), x.std(0) + 1e-9
    z = np.c_[(x - mean) / scale, np.ones(len(x))]
    weights = np.zeros((z.shape[1], classes))
    target = np.eye(classes)[y]
    for _ in range(400):
        logits = z @ weights
        logits -= logits.max(1, keepdims=True)
        odds = np.exp(logits)
        odds /= odds.sum(1, keepdims=True)
        weights -= 0.1 * (z.T @ (odds - target) / len(z) + 1e-3 * weights)
    return weights, mean, scale


def guesses(model: tuple[Array, Array, Array], x: Array) -> NDArray[np.int64]:
    """The likeliest class of each row."""
    weights, mean, scale = model
    found: NDArray[np.int64] = (np.c_[(x - mean) / scale, np.ones(len(x))] @ weights).argmax(1)
    return found


def accuracy(x: Array, y: NDArray[np.int64], classes: int, rng: random.Random) -> tuple[int, int]:
    """Right guesses, and of how many, each made by a model that has not seen the answer."""
    order = list(range(len(x)))
    rng.shuffle(order)
    right = 0
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        rest = sorted(set(order) - set(held))
        model = fit(x[rest], y[rest], classes)
        right += int((guesses(model, x[held]) == y[held]).sum())
    return right, len(x)


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def measure(column: str, own_lengths: bool, answers: int, seed: int) -> dict[str, float]:
    """Accuracy of the guesses for one column and row."""
    rng = random.Random(f"{seed}/{column}/{own_lengths}")
    peers = new_peers()
    rows, labels = [], []
    for label, (topic, about) in enumerate(TOPICS.items()):
        mean = about.mean_tokens if own_lengths else MEAN_TOKENS
        for _ in range(answers):
            length = max(5, round(rng.lognormvariate(math.log(mean), 0.4)))
            message, _ = peers.seal(b"prompt")
            keys = peers.open(message)
            rows.append(features(observe(answer(topic, length, rng), column, keys, rng)))
            labels.append(label)
    right, count = accuracy(np.array(rows), np.array(labels), len(TOPICS), rng)
    low, high = wilson(right, count)
    return {"accuracy": right / count, "low": low, "high": high, "answers": count}


def main() -> int:
    """Measure and print; keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--answers", type=int, default=200, help="per topic, row and column")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 answers")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="JSON file to write")
    args = parser.parse_args()
    answers = 20 if args.quick else args.answers
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row, own_lengths in (("equal lengths", False), ("own lengths", True)):
        for column in COLUMNS:
            result = measure(column, own_lengths, answers, args.seed)
            found.setdefault(row, {})[column] = result
            print(
                f"{row:14} {column:9} {result['accuracy']:.1%}"
                f"  ({result['low']:.1%} to {result['high']:.1%})",
                file=sys.stderr if args.json else sys.stdout,
                flush=True,
            )
    chance = 1 / len(TOPICS)
    print(f"chance {chance:.1%}", file=sys.stderr if args.json else sys.stdout)
    results = {"topics": list(TOPICS), "chance": chance, "guesses": found}
    text = report("link/privacy.py", ("cryptography", "numpy"), results)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
