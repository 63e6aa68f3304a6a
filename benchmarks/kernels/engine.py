"""The engine on the GPU, whole: decode steps against a copy of their bytes, and serving.

Models of published shapes with random weights. A decode step is a case like a kernel's; what takes
a while (256 requests, a cold start, the same tokens in every batch) is a report.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from kernels.case import Bar, Case, Limit, Report, Work
from kernels.models import CONFIGS, NoWeights, architecture, text_model, write_checkpoint

from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_memory import kv_bytes_per_token
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished, TextDelta
from tidegate.engine.executor import Row
from tidegate.engine.request import GenerationRequest, RequestId, SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.engine.settings import EngineSettings
from tidegate.model.architecture import Architecture

_PAST = 1024
"""Tokens before a measured decode step."""
_PACKED_BITS = 4 + 32 / 128
"""A scale and a zero-point of 16 bits for 128 inputs."""
_GREEDY = Draw(params=SamplingParams(max_tokens=1, temperature=0.0), seed=0, position=0)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as it is served."""

    name: str
    bits: int = 16
    deterministic: bool = False
    rows: int = 256

    def executor(
        self, device: torch.device, context_tokens: int, *, kv_tokens: int | None = None
    ) -> GpuExecutor:
        """On the GPU, or on the references where there is none."""
        arch = architecture(self.name)
        on_gpu = device.type == "cuda"
        settings = GpuSettings(
            rows=self.rows,
            context_tokens=context_tokens,
            step_tokens=8192 if on_gpu else 4 * self.rows,
            kv_tokens=kv_tokens if on_gpu else self.rows * context_tokens,
            activations="bf16" if on_gpu else "fp32",
            deterministic=self.deterministic,
            device=device.type,
        )
        return GpuExecutor(arch, NoWeights(arch, bits=self.bits), settings)

    @property
    def title(self) -> str:
        """For people."""
        kind = "bf16" if self.bits == 16 else "W4A16"
        return f"{self.name} {kind}{' deterministic' if self.deterministic else ''}"


def cases(quick: bool) -> Iterator[Case]:
    """Decode steps of one request and of 256, sampling included."""
    small, large = ("tiny", "tiny") if quick else ("Qwen3-0.6B", "Qwen3-8B")
    past = 40 if quick else _PAST
    yield _decode(Model(name=small, rows=1), 1, past, 0.5)
    yield _decode(Model(name=large, rows=1), 1, past, 0.7)
    yield _decode(Model(name=large, rows=1, bits=4), 1, past, 0.5)
    many = 4 if quick else 256
    yield _decode(Model(name=large, rows=many), many, past, None)
    yield _cost(large, 4 if quick else 96, past)


def _decode(model: Model, rows: int, past: int, least: float | None) -> Case:
    return Case(
        name=f"decode {model.title}, {rows} rows behind {past} tokens",
        make=partial(_decode_work, model, rows, past),
        bytes_moved=step_bytes(architecture(model.name), model.bits, rows * past),
        bars=() if least is None else (Bar(kind="copy", at_least=least),),
    )


def _cost(name: str, rows: int, past: int) -> Case:
    """A deterministic step beside a usual one; both models and caches must fit at once."""
    fixed, usual = Model(name=name, rows=rows, deterministic=True), Model(name=name, rows=rows)

    def make(device: torch.device) -> Work:
        ours = _decode_work(fixed, rows, past, device, kv_tokens=rows * (past + 32))
        other = _decode_work(usual, rows, past, device, kv_tokens=rows * (past + 32))
        return Work(run=ours.run, baseline=other.run)

    return Case(
        name=f"decode {fixed.title}, {rows} rows behind {past} tokens",
        make=make,
        bytes_moved=step_bytes(architecture(name), 16, rows * past),
        baseline="the same step, not deterministic",
        bars=(Bar(kind="baseline", at_least=1 / 1.15),),
    )


def step_bytes(arch: Architecture, bits: int, cached_tokens: int) -> int:
    """Weights once, and keys and values in bf16 once; what a decode step reads at least."""
    table = arch.vocab * arch.width
    layers = arch.parameters - table * (1 if arch.tied_head else 2)
    weights = layers * (2 if bits == 16 else _PACKED_BITS / 8) + table * 2
    return int(weights + cached_tokens * kv_bytes_per_token(arch, GpuSettings()))


def _decode_work(
    model: Model, rows: int, past: int, device: torch.device, *, kv_tokens: int | None = None
) -> Work:
    executor = model.executor(device, 2 * past, kv_tokens=kv_tokens)
    each = -(-(past + 1) // executor.kv.block_tokens)
    blocks = np.arange(rows * each, dtype=np.int32).reshape(rows, each)
    step = [
        Row(tokens=np.array([row % 100]), past=past, blocks=own) for row, own in enumerate(blocks)
    ]
    return Work(run=executor.prepared(step, [_GREEDY] * rows))


def reports(quick: bool) -> Iterator[Report]:
    """What takes a while."""
    large, small = ("tiny", "tiny") if quick else ("Qwen3-8B", "Qwen3-0.6B")
    sizes = (4, 24, 8) if quick else (256, 1024, 1024)
    yield Report(
        name=f"{sizes[0]} requests of {sizes[1]} and {sizes[2]} tokens on {large} bf16",
        measure=partial(_throughput, Model(name=large, rows=sizes[0]), *sizes),
        limits=(
            Limit(figure="output_tokens_per_s", at_least=7600),
            Limit(figure="host_ms_per_step", at_most=0.3),
        ),
    )
    yield Report(
        name=f"the same tokens in every batch, {small} bf16 deterministic",
        measure=partial(
            _invariance, Model(name=small, deterministic=True, rows=4 if quick else 32)
        ),
        limits=(Limit(figure="answers_that_differ", at_most=0),),
    )
    yield Report(
        name=f"what one order costs in serving, {large} bf16",
        measure=partial(_serving_cost, large, (4, 24, 8) if quick else (128, 1024, 256)),
        limits=(Limit(figure="cost", at_most=0.15),),
    )
    yield Report(
        name=f"cold start of {large} from local files",
        measure=partial(_cold_start, large),
        limits=(
            Limit(figure="to_first_token_s", at_most=10),
            Limit(figure="to_first_token_compiling_s", at_most=10),
        ),
    )
    if not quick:
        for name in (small, large):
            yield Report(name=f"generate of transformers, {name}", measure=partial(_peer, name))


def _engine(executor: GpuExecutor, *, waiting: int = 4096) -> Engine:
    limits = executor.limits
    return Engine(
        executor,
        text_model(limits.vocab, limits.context_tokens),
        model_id="random",
        settings=EngineSettings(most_waiting=waiting, speculation=False),
    )


def _request(name: str, prompt: Sequence[int], answer_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        id=RequestId(name),
        prompt=tuple(prompt),
        sampling=SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True),
    )


async def _answer(engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
    tokens: list[int] = []
    async for event in engine.submit(request):
        if isinstance(event, TextDelta):
            tokens += event.tokens
        else:
            assert isinstance(event, Finished), event
    return tuple(tokens)


async def _answers(
    executor: GpuExecutor, requests: Sequence[GenerationRequest]
) -> list[tuple[int, ...]]:
    engine = _engine(executor)
    loop = asyncio.create_task(engine.run())
    try:
        return list(await asyncio.gather(*(_answer(engine, one) for one in requests)))
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop


def _prompts(count: int, tokens: int, vocab: int) -> list[list[int]]:
    return np.random.default_rng(1).integers(0, min(vocab, 30_000), (count, tokens)).tolist()


def _throughput(
    model: Model, count: int, prompt_tokens: int, answer_tokens: int, device: torch.device
) -> dict[str, float]:
    executor = model.executor(device, prompt_tokens + answer_tokens)
    prompts = _prompts(count, prompt_tokens, executor.limits.vocab)
    # What the run below meets is compiled, and its usual shapes are recorded, by a shorter one.
    warm = [_request(f"w{n}", prompt, 16) for n, prompt in enumerate(prompts)]
    asyncio.run(_answers(executor, warm))
    began_s = time.perf_counter()
    requests = [_request(f"r{n}", one, answer_tokens) for n, one in enumerate(prompts)]
    found = asyncio.run(_answers(executor, requests))
    elapsed_s = time.perf_counter() - began_s
    tokens = sum(len(one) for one in found)
    assert tokens == count * answer_tokens
    return {
        "output_tokens_per_s": tokens / elapsed_s,
        "elapsed_s": elapsed_s,
        "kv_tokens": float(executor.kv.blocks * executor.kv.block_tokens),
        **_host_time(executor, count, prompt_tokens, device),
    }


def _serving_cost(name: str, sizes: tuple[int, int, int], device: torch.device) -> dict[str, float]:
    """Prompts and answers of the deterministic mode beside the usual one, one behind the other."""
    found = {}
    for kind, deterministic in (("usual", False), ("in_one_order", True)):
        model = Model(name=name, rows=sizes[0], deterministic=deterministic)
        told = _throughput(model, *sizes, device)
        found[f"{kind}_output_tokens_per_s"] = told["output_tokens_per_s"]
        _give_back(device)
    usual, ordered = found.values()
    return found | {"cost": usual / ordered - 1}


def _host_time(
    executor: GpuExecutor, rows: int, past: int, device: torch.device
) -> dict[str, float]:
    """What a decode step takes in the engine, and what of it the GPU does not."""
    answer_tokens = 8 if device.type == "cpu" else 129
    prompts = [[n % 100] * 3 for n in range(rows)]
    requests = [_request(f"h{n}", one, answer_tokens) for n, one in enumerate(prompts)]
    asyncio.run(_answers(executor, requests))
    began_s = time.perf_counter()
    asyncio.run(_answers(executor, requests))
    step_s = (time.perf_counter() - began_s) / answer_tokens
    blocks = np.arange(rows * 9, dtype=np.int32).reshape(rows, 9)
    step = [Row(tokens=np.array([1]), past=answer_tokens // 2, blocks=own) for own in blocks]
    launch = executor.prepared(step, [_GREEDY] * rows)
    if device.type == "cpu":
        return {"step_ms": step_s * 1e3, "host_ms_per_step": step_s * 1e3}
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    began.record()
    for _ in range(20):
        graph.replay()
    ended.record()
    ended.synchronize()
    device_ms = began.elapsed_time(ended) / 20
    return {
        "step_ms": step_s * 1e3,
        "device_ms_per_step": device_ms,
        "host_ms_per_step": step_s * 1e3 - device_ms,
    }


def _invariance(model: Model, device: torch.device) -> dict[str, float]:
    """Answers alone, together, and from a cache that holds hardly more than one of them."""
    answer_tokens = 8 if device.type == "cpu" else 128
    context_tokens = 512
    executor = model.executor(device, context_tokens)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 250, int(n)).tolist() for n in rng.integers(3, 200, model.rows)]
    requests = [_request(f"r{n}", one, answer_tokens) for n, one in enumerate(prompts)]
    alone = [asyncio.run(_answers(executor, [one]))[0] for one in requests]
    together = asyncio.run(_answers(executor, requests))
    arch, narrow = architecture(model.name), replace(executor.settings, kv_tokens=context_tokens)
    executor.close()
    del executor
    _give_back(device)
    crowded = asyncio.run(_answers(GpuExecutor(arch, NoWeights(arch), narrow), requests))
    differ = sum(a != b for a, b in zip(alone, together, strict=True))
    return {
        "answers": float(len(alone)),
        "answers_that_differ": differ + sum(a != b for a, b in zip(alone, crowded, strict=True)),
    }


def _give_back(device: torch.device) -> None:
    """What is not used any more, to the device: the next executor asks it what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_START = """
import time
began_s = time.perf_counter()
import sys
from pathlib import Path
import numpy as np
from tidegate.cloud.gpu_executor import GpuExecutor
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.engine.executor import ExecutorStep, Row
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.model.checkpoint import Checkpoint
sizes = {"rows": 4, "step_tokens": 64, "kv_tokens": 2048, "activations": "fp32"}
settings = GpuSettings(device=sys.argv[2], context_tokens=512,
                       **({} if sys.argv[2] == "cuda" else sizes))
with Checkpoint.open(Path(sys.argv[1])) as checkpoint:
    executor = GpuExecutor(checkpoint.decoder, checkpoint.weights(), settings)
row = Row(tokens=np.arange(20), past=0, blocks=np.arange(2, dtype=np.int32))
draw = Draw(params=SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9), seed=1, position=20)
executor.submit(ExecutorStep(rows=(row,)), [draw]).result()
print(time.perf_counter() - began_s)
"""


def _cold_start(name: str, device: torch.device) -> dict[str, float]:
    """A process from its start to the first token: with every kernel to compile, and with none.

    The files were just written, so they are in the host's memory. Kernels are kept in a folder of
    the run's own, empty at first.
    """
    _give_back(device)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as compiled:
        write_checkpoint(Path(folder), name)
        first_s, _ = _started(folder, compiled, device)
        again_s, inside_s = _started(folder, compiled, device)
    return {
        "to_first_token_s": again_s,
        "to_first_token_compiling_s": first_s,
        "without_the_interpreter_s": inside_s,
    }


def _started(folder: str, compiled: str, device: torch.device) -> tuple[float, float]:
    """Seconds of a process to its first token: all of them, and those behind Python's own start."""
    began_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", _START, folder, device.type],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": compiled},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return time.perf_counter() - began_s, float(done.stdout)


def _peer(name: str, device: torch.device) -> dict[str, float]:
    """The same shape in the library that most people run it in: one request, and 32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIGS[name])
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found: dict[str, float] = {}
    for rows in (1, 32):
        prompt = torch.randint(0, 30_000, (rows, 128), device=device)
        for tokens in (8, 128):  # the first ones warm up
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            model.generate(
                prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            torch.cuda.synchronize()
            elapsed_s = time.perf_counter() - began_s
        found[f"tokens_per_s_of_{rows}"] = rows * 128 / elapsed_s
    return found
