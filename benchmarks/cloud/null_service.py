"""The service's own parts around an executor that returns at once, as a process.

    python benchmarks/cloud/null_service.py serve --streams 32          until SIGTERM
    python benchmarks/cloud/null_service.py engine --streams 32 --tokens 256

`serve` is what `tidegate cloud` builds, less the model: engine, API, admission of 256 calls,
uvicorn, an orderly stop. `engine` reads the same answers without HTTP, in the same kind of process,
and prints its seconds and seconds of processor time. `--profile FILE` writes what cProfile saw of
the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cloud.null_executor import NullExecutor

from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import create_app
from tidegate.api.lifecycle import run_service, stop_on_signals
from tidegate.api.server import BoundServer
from tidegate.api.settings import surface_for
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.engine.text import TextModel
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.text_files import write_text_files

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "assistant" / "cloud"
CONTEXT_TOKENS = 2048


def make_engine(rows: int) -> Engine:
    """The cloud's engine with the demo's tokenizer and no model behind it."""
    with Checkpoint.open(MODEL) as checkpoint, tempfile.TemporaryDirectory() as folder:
        write_text_files(checkpoint, Path(folder))
        text = TextModel.load(Path(folder), context_tokens=CONTEXT_TOKENS)
        vocab = checkpoint.decoder.vocab
    words = [token for token in range(vocab) if _is_word(text.decode([token]))]
    executor = NullExecutor(words, vocab=vocab, rows=rows, context_tokens=CONTEXT_TOKENS)
    settings = EngineSettings(most_waiting=256, shared_guesses=False)
    return Engine(executor, text, model_id="null", settings=settings)


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isascii() and text.strip().isalpha()


async def serve(rows: int) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    stop_on_signals(stop)
    engine = make_engine(rows)
    backend = EngineBackend(engine, route="cloud", created_s=0)
    app = create_app(backend, settings=replace(surface_for("127.0.0.1", key_hashes=())))
    server = BoundServer(app, "127.0.0.1", 0)
    sys.stdout.write(f"null service on {server.url}\n")
    sys.stdout.flush()
    await run_service(engine=engine, server=server, stop=stop, drain_s=10)


async def bare(streams: int, tokens: int) -> dict[str, float]:
    """All answers of one round, read in the engine's own process."""
    engine = make_engine(streams)
    loop = asyncio.create_task(engine.run())

    async def read(number: int) -> int:
        request = GenerationRequest(
            id=RequestId(f"{number}"),
            prompt=tuple(range(300 + number, 332 + number)),
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        )
        async for event in engine.submit(request):
            if isinstance(event, Finished):
                return event.usage.completion_tokens
        raise AssertionError("an answer ends")

    await read(-1)  # the thread of the steps, and what is computed once
    began_s, cpu_s = time.perf_counter(), time.process_time()
    made = await asyncio.gather(*(read(number) for number in range(streams)))
    found = {
        "tokens": sum(made),
        "wall_s": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - cpu_s,
    }
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    return found


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("way", choices=("serve", "engine"))
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    profile = cProfile.Profile()
    if args.profile is not None:
        profile.enable()
    if args.way == "serve":
        asyncio.run(serve(args.streams))
    else:
        print(json.dumps(asyncio.run(bare(args.streams, args.tokens))))
    if args.profile is not None:
        profile.disable()
        profile.dump_stats(args.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
