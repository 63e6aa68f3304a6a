r"""What each quantiser costs at like bits: our passes and presets, and the peers' quantisers.

On both checkpoints of examples/assistant. Calibration is 128 chats of the corpus's training split
(seeds from 5 000 000 on, at most 256 tokens each) for everyone; measured is every position of
prompts and right answers of its test split, against the checkpoint in float32. Bits per weight
count integers, float16 scales and zero-points of all layers and tables; every other float counts
16. Peers keep their own formats, are run with weights as they packed them and activations in
float32, and live in environments of their own (benchmarks/converters/memory.py names them).
Asserts nothing.

    python benchmarks/converters/quantisers.py --keep benchmarks/results/quantisers \
        --builder-python genai/bin/python --optimum-python optimum/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from assistant.corpus import generate, training_conversation  # noqa: E402
from assistant.evaluate import encoded  # noqa: E402
from assistant.tokenizer import encode_messages  # noqa: E402
from report import report  # noqa: E402

from tidegate.converters.driver.pipeline import Job, compress  # noqa: E402
from tidegate.converters.driver.store import StoreWeights  # noqa: E402
from tidegate.converters.evaluation.measures import compare, summarise  # noqa: E402
from tidegate.converters.passes.base import CalibrationText, Model  # noqa: E402
from tidegate.converters.recipe_file import load_recipe, parse_recipe  # noqa: E402
from tidegate.converters.training.sequences import SequenceOps, Tokens, batched  # noqa: E402
from tidegate.kernels.torch_ops import WeightTensors  # noqa: E402
from tidegate.model.architecture import Architecture  # noqa: E402
from tidegate.model.blocks import linear_roles  # noqa: E402
from tidegate.model.checkpoint import Checkpoint  # noqa: E402
from tidegate.model.packed import Array, PackedLinear  # noqa: E402
from tidegate.model.recipe import Recipe  # noqa: E402
from tidegate.model.resident import ResidentWeights  # noqa: E402
from tidegate.model.walk import Weights, decoder  # noqa: E402

CHATS, CHAT_TOKENS, FIRST_SEED = 128, 256, 5_000_000
TIER_WEIGHTS = (1.2, 1.2, 1.2, 1.6)
"""As in training (examples/assistant/batches.py)."""

PASSES: Mapping[str, tuple[str, ...]] = {
    "round to nearest": ("rtn\nclip = false",),
    "clip": ("clip",),
    "awq, clip": ("awq", "clip"),
    "gptq": ("gptq",),
    "awq, gptq": ("awq", "gptq"),
    "scale_estimation": ("scale_estimation",),
}
"""Passes compared in one format: 4 bits in groups of 128 with zero-points, tables 8 bits."""

PRESETS = ("tiny", "fast", "balanced", "quality", "tuned", "int8")

GENAI: Mapping[str, tuple[str, ...]] = {
    "onnxruntime-genai, its defaults": (),
    "onnxruntime-genai, groups of 128": (
        "block_size=128",
        "is_symmetric=false",
        "shared_embeddings=false",
    ),
}
NNCF: Mapping[str, tuple[str, ...]] = {
    "NNCF, nothing compressed": ("0",),
    "NNCF AWQ, scale estimation": ("128", "awq", "scale"),
    "NNCF AWQ, scale estimation, groups of 64": ("64", "awq", "scale"),
    "NNCF GPTQ": ("128", "gptq"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantiser on one checkpoint."""

    checkpoint: str
    method: str
    bits_per_weight: float
    kl_mean: float
    kl_p99: float
    agreement: float
    perplexity: float
    exact_match: float
    wall_s: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A checkpoint, the texts, and what it says about them."""

    name: str
    folder: Path
    arch: Architecture
    weights: ResidentWeights
    calibration: CalibrationText
    batches: list[list[Tokens]]
    answered: list[int]
    """How many tokens at the end of each sequence are the answer."""
    expected: list[Array]
    """Logits [tokens, V], sequence by sequence."""

    @classmethod
    def of(cls, name: str, examples: int) -> Bench:
        """Read a checkpoint of examples/assistant and run it on the test split."""
        folder = ROOT / "examples" / "assistant" / name
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with Checkpoint.open(folder) as checkpoint:
            arch, weights = checkpoint.decoder, ResidentWeights(checkpoint.weights())
            for role, found in linear_roles(arch).items():
                assert weights.linear(role).inputs == found.shape[1]
            tests = [encoded(tokenizer, one) for one in generate("test", count=examples)]
            batches = batched([tuple(ids) for ids, _ in tests], 4096)
            expected = list(logits(arch, weights, batches))
        chats = [
            training_conversation(FIRST_SEED + number, tier_weights=TIER_WEIGHTS).messages()
            for number in range(CHATS)
        ]
        sequences = [tuple(encode_messages(tokenizer, chat)[0][:CHAT_TOKENS]) for chat in chats]
        return cls(
            name=name,
            folder=folder,
            arch=arch,
            weights=weights,
            calibration=CalibrationText(
                name="assistant chats",
                sha256="0" * 64,
                sequences=tuple(one for one in sequences if len(one) > 1),
            ),
            batches=batches,
            answered=[count for _, count in tests],
            expected=expected,
        )

    def row(
        self, method: str, found: Iterator[Array], bits_per_weight: float, wall_s: float | None
    ) -> Row:
        """Compare logits, sequence by sequence, with the checkpoint's."""
        sequences = [tokens for batch in self.batches for tokens in batch]
        parts, right = [], []
        for tokens, count, expected, got in zip(
            sequences, self.answered, self.expected, found, strict=True
        ):
            parts.append(compare(expected, got, tokens[1:]))
            best = got[len(tokens) - count - 1 : len(tokens) - 1].argmax(axis=-1)
            right.append(tuple(best) == tokens[len(tokens) - count :])
        summary = summarise(parts)
        return Row(
            checkpoint=self.name,
            method=method,
            bits_per_weight=round(bits_per_weight, 3),
            kl_mean=round(summary.kl_mean, 6),
            kl_p99=round(summary.kl_p99, 5),
            agreement=round(summary.agreement, 4),
            perplexity=round(summary.perplexity, 3),
            exact_match=round(float(np.mean(right)), 4),
            wall_s=None if wall_s is None else round(wall_s, 1),
        )


@torch.inference_mode()
def logits(arch: Architecture, weights: Weights, batches: list[list[Tokens]]) -> Iterator[Array]:
    """Of every token, sequence by sequence, [tokens, V]."""
    resident, tensors = ResidentWeights(weights), WeightTensors()
    for batch in batches:
        found = decoder(SequenceOps(batch, tensors), arch, resident)
        for part in torch.split_with_sizes(found, [len(tokens) for tokens in batch]):
            yield part.numpy()


def recipes() -> Iterator[tuple[str, Recipe]]:
    """Ours."""
    for name, kinds in PASSES.items():
        yield name, in_groups_of_128(kinds, symmetric=False, bits=4)
    nearest = PASSES["round to nearest"]
    yield "round to nearest, symmetric", in_groups_of_128(nearest, symmetric=True, bits=4)
    yield "round to nearest, 8 bits", in_groups_of_128(nearest, symmetric=True, bits=8)
    for preset in PRESETS:
        yield f"preset {preset}", load_recipe(preset)


def in_groups_of_128(kinds: Sequence[str], *, symmetric: bool, bits: int) -> Recipe:
    """A recipe of one format; its tables have 8 bits."""
    rule = f'[[formats]]\nmatch = ["*"]\nbits = {bits}\ngroup_size = 128\n'
    rule += f"symmetric = {str(symmetric).lower()}\n"
    names = (kind.partition("\n") for kind in kinds)
    passes = [f'[[passes]]\nkind = "{name}"\n{options}\n' for name, _, options in names]
    return parse_recipe('name = "compared"\n' + rule + "".join(passes), "compared.toml")


def ours(bench: Bench, method: str, recipe: Recipe) -> Row:
    """Compress by a recipe and measure."""
    model = Model(arch=bench.arch, weights=bench.weights)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            recipe=recipe,
            model=model,
            text=bench.calibration,
            folder=Path(folder),
            progress=lambda what, done, total: None,
        )
        began_s = time.perf_counter()
        weights = ResidentWeights(StoreWeights(compress(job).store))
        wall_s = time.perf_counter() - began_s
        found = logits(bench.arch, weights, bench.batches)
        return bench.row(method, found, bits_per_weight(bench.arch, weights), wall_s)


def bits_per_weight(arch: Architecture, weights: Weights) -> float:
    """Over all linear layers and tables."""
    bits = count = 0
    for role in linear_roles(arch):
        linear = weights.linear(role)
        assert isinstance(linear, PackedLinear)
        bits, count = bits + 8 * linear.nbytes, count + linear.outputs * linear.inputs
    return bits / count


def peer(bench: Bench, script: str, python: Path, method: str, options: Sequence[str]) -> Row:
    """Let a peer convert, in its own environment, and measure the logits that it gives."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = {
            "calibration": bench.calibration.sequences,
            "test": [tokens for batch in bench.batches for tokens in batch],
        }
        (folder / "sequences.json").write_text(json.dumps(texts))
        tool = [str(python), str(Path(__file__).with_name(script)), str(bench.folder)]
        done = subprocess.run(
            [*tool, str(folder), *options], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{method}: {done.stderr[-2000:]}")
        found = np.load(folder / "logits.npy")
        ends = np.cumsum([len(tokens) for tokens in texts["test"]])[:-1]
        weights = sum(int(np.prod(one.shape)) for one in linear_roles(bench.arch).values())
        bits = json.loads((folder / "bits.json").read_text())
        return bench.row(method, iter(np.split(found, ends)), bits / weights, None)


def peer_versions(args: argparse.Namespace) -> dict[str, str]:
    """What the peers' environments hold."""
    found: dict[str, str] = {}
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    for python, packages in (
        (args.builder_python, ("onnxruntime-genai", "onnxruntime")),
        (args.optimum_python, ("nncf", "openvino", "optimum-intel")),
    ):
        if python is not None:
            said = subprocess.check_output([python, "-c", code, *packages], text=True)
            found |= dict(zip(packages, said.split(), strict=True))
    return found


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Every method on every checkpoint."""
    for name in args.checkpoints:
        bench = Bench.of(name, args.examples)
        yield bench.row("checkpoint in float32", iter(bench.expected), 32.0, None)
        jobs = [partial(ours, bench, method, recipe) for method, recipe in recipes()]
        for script, python, methods in (
            ("peer_genai.py", args.builder_python, GENAI),
            ("peer_nncf.py", args.optimum_python, NNCF),
        ):
            if python is not None:
                jobs += [
                    partial(peer, bench, script, python, method, options)
                    for method, options in methods.items()
                ]
        for job in jobs:
            yield job()


def line(row: Row) -> str:
    """A row of the table."""
    seconds = "" if row.wall_s is None else f"{row.wall_s:7.1f} s"
    return (
        f"{row.checkpoint:<6} {row.method:<42} {row.bits_per_weight:7.3f} bpw"
        f"  KL {row.kl_mean:.5f}  p99 {row.kl_p99:.4f}  top-1 {row.agreement:.4f}"
        f"  ppl {row.perplexity:8.3f}  exact {row.exact_match:.4f} {seconds}"
    ).rstrip()


def main() -> int:
    """Print the table; keep it as text and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoints", nargs="+", default=["edge", "cloud"])
    parser.add_argument("--examples", type=int, default=400, help="of the test split")
    parser.add_argument("--builder-python", type=Path, help="has onnxruntime-genai")
    parser.add_argument("--optimum-python", type=Path, help="has optimum-intel and nncf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="write this name with .json and .txt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for row in measure(args):
        rows.append(row)
        print(line(row), flush=True)
    if args.keep is not None:
        found = {"peers": peer_versions(args), "rows": [asdict(row) for row in rows]}
        body = report("converters/quantisers.py", ("torch", "numpy"), found)
        args.keep.with_suffix(".json").write_text(body + "\n")
        args.keep.with_suffix(".txt").write_text("".join(line(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
