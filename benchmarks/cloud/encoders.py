"""What dynamic batching gives, and what waiting for company costs: all-MiniLM-L6-v2 on torch.

Clients ask for one text at a time, each as soon as it has its last one. Turns alternate within each
round: every number of clients with every wait, and without batches at all. Texts have 4 to 40
tokens, drawn once. Beside that, what a run costs by its length: a run of no tokens would take as
long as `run_worth_tokens` tokens do, which is where `BatchLimits.padding_tokens` comes from.

    python benchmarks/cloud/encoders.py --model FOLDER --keep benchmarks/results/encoders.json
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from report import report  # noqa: E402

from tidegate.api.encoder_model import EmbeddingModel, ServedAs, open_tokenizer  # noqa: E402
from tidegate.cloud.encoder import TorchEncoder, TorchEncoderSettings  # noqa: E402
from tidegate.cloud.encoders import ATTENTION_PADDING  # noqa: E402
from tidegate.engine.text_batches import BatchLimits  # noqa: E402
from tidegate.model.checkpoint import Checkpoint  # noqa: E402
from tidegate.model.encoder import EncoderArchitecture  # noqa: E402
from tidegate.model.encoder_use import usual_use  # noqa: E402

CLIENTS = (1, 8, 64)
WAITS_MS = (0, 2, 10)
FIRST_TOKEN, TEXTS = 1000, 512
RUN_LENGTHS = (1, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One number of clients on one way for some time."""

    texts_per_s: float
    p50_ms: float
    p99_ms: float
    batch_texts: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """Medians over the rounds; `wait_ms` None runs every text alone."""

    clients: int
    wait_ms: int | None
    turn: Turn


def texts_of(seed: int) -> list[tuple[int, ...]]:
    """Token ids that the model knows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 41, TEXTS)
    return [tuple(rng.integers(FIRST_TOKEN, 20_000, length).tolist()) for length in lengths]


def open_model(folder: Path, limits: BatchLimits, threads: int) -> EmbeddingModel:
    """The model behind these limits."""
    with Checkpoint.open(folder) as checkpoint:
        arch = checkpoint.architecture
        assert isinstance(arch, EncoderArchitecture), f"{folder}: no encoder"
        settings = TorchEncoderSettings(
            batch_rows=limits.rows, batch_tokens=limits.tokens, threads=threads
        )
        encoder = TorchEncoder(arch, checkpoint.weights(), settings)
    served = ServedAs(model_id="minilm", created_s=0, limits=limits)
    tokenizer = open_tokenizer(folder / "tokenizer.json")
    return EmbeddingModel(encoder, tokenizer, usual_use(arch), served)


async def turn(model: EmbeddingModel, clients: int, seconds: float, seed: int) -> Turn:
    """Ask for so long; a request counts if it began in time."""
    texts, times, batches = texts_of(seed), list[float](), list[int]()
    model.batcher.saw = lambda seen: batches.append(seen.texts)
    await model.embed((texts[0],))
    batches.clear()
    began_s = time.perf_counter()

    async def client(number: int) -> None:
        place = number
        while (asked_s := time.perf_counter()) - began_s < seconds:
            await model.embed((texts[place % TEXTS],))
            times.append(time.perf_counter() - asked_s)
            place += clients

    await asyncio.gather(*(client(number) for number in range(clients)))
    took_s = time.perf_counter() - began_s
    cuts = np.percentile(times, (50, 99)) * 1000
    return Turn(
        texts_per_s=len(times) / took_s,
        p50_ms=float(cuts[0]),
        p99_ms=float(cuts[1]),
        batch_texts=statistics.fmean(batches),
    )


async def ways(folder: Path, *, repeats: int, seconds: float, threads: int) -> list[Way]:
    """All turns of all rounds, as medians."""
    models: dict[int | None, EmbeddingModel] = {
        wait_ms: open_model(
            folder,
            BatchLimits(wait_s=wait_ms / 1000, padding_tokens=ATTENTION_PADDING),
            threads,
        )
        for wait_ms in WAITS_MS
    }
    models[None] = open_model(folder, BatchLimits(rows=1), threads)
    found: dict[tuple[int, int | None], list[Turn]] = {}
    for number in range(repeats):
        for clients in CLIENTS:
            for wait_ms, model in models.items():
                one = await turn(model, clients, seconds, number)
                found.setdefault((clients, wait_ms), []).append(one)
                print(f"round {number}: {clients} clients, wait {wait_ms}: {one}", file=sys.stderr)
    for model in models.values():
        model.close()
    return [
        Way(clients=clients, wait_ms=wait_ms, turn=middle(turns))
        for (clients, wait_ms), turns in found.items()
    ]


def middle(turns: Sequence[Turn]) -> Turn:
    """Each figure's median over the rounds."""
    whole = [asdict(one) for one in turns]
    return Turn(**{name: statistics.median(one[name] for one in whole) for name in whole[0]})


def run_costs(folder: Path, *, repeats: int, threads: int) -> dict[str, object]:
    """Milliseconds of a run of one text, by its tokens, and where the line through them begins."""
    with Checkpoint.open(folder) as checkpoint:
        arch = checkpoint.architecture
        assert isinstance(arch, EncoderArchitecture)
        settings = TorchEncoderSettings(threads=threads)
        encoder = TorchEncoder(arch, checkpoint.weights(), settings)
    times: dict[int, list[float]] = {length: [] for length in RUN_LENGTHS}
    for _ in range(4 * repeats):
        for length in RUN_LENGTHS:
            began_s = time.perf_counter()
            encoder.encode([[FIRST_TOKEN] * length])
            times[length].append(time.perf_counter() - began_s)
    costs = {length: statistics.median(some) * 1000 for length, some in times.items()}
    slope, start = np.polyfit(list(costs), list(costs.values()), 1)
    return {"run_ms": costs, "run_worth_tokens": float(start / slope)}


def main() -> None:
    """Run it and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="all-MiniLM-L6-v2's folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="file to write the report to")
    args = parser.parse_args()
    cost = run_costs(args.model, repeats=args.repeats, threads=args.threads)
    found = asyncio.run(
        ways(args.model, repeats=args.repeats, seconds=args.seconds, threads=args.threads)
    )
    results = {"one_text": cost, "ways": [asdict(way) for way in found]}
    text = report("cloud/encoders.py", ("torch", "numpy", "tokenizers"), results)
    print(text)
    if args.keep is not None:
        args.keep.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
