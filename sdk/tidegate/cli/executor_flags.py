"""Flags of what runs a model in the cloud: `tidegate cloud` and `tidegate ray` have them alike."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidegate.cloud.executor_choice import ExecutorSettings


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--executor",
        choices=("auto", "torch", "gpu"),
        default="auto",
        help="what runs the model (default: a CUDA device where there is one, else torch)",
    )
    parser.add_argument(
        "--rows", type=int, help="requests that run at once (default: 8 on torch, 256 on a GPU)"
    )
    parser.add_argument("--threads", type=int, help="of torch (default: the runtime's choice)")
    parser.add_argument(
        "--step-tokens",
        type=int,
        help="tokens of one step, what prompts are cut to (default: 512 on torch, 8192 on a GPU)",
    )
    parser.add_argument(
        "--memory-mib", type=int, help="of the GPU (default: nine tenths of what is free)"
    )
    parser.add_argument(
        "--kv-precision",
        choices=("same", "int8", "fp8"),
        help="of keys and values on a GPU (default: that of the activations)",
    )
    parser.add_argument(
        "--activations", choices=("bf16", "fp16", "fp32"), help="on a GPU (default: bf16)"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="split the model over N GPUs, one process each; over N processes where there are none",
    )
    parser.add_argument(
        "--int8-activations",
        action="store_const",
        const=True,
        help="on a GPU, multiply 8-bit weights with activations rounded to 8 bits",
    )
    parser.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help="on a GPU, the same tokens whatever else is in a step, at some speed",
    )


def read_executor(args: argparse.Namespace) -> ExecutorSettings:
    """Read what `add_executor` declared, and `--context`.

    Raises:
        ConfigError: a value is out of range.
    """
    from tidegate.cloud.executor_choice import ExecutorSettings

    return ExecutorSettings(
        choice=args.executor,
        context_tokens=args.context,
        rows=args.rows,
        threads=args.threads,
        step_tokens=args.step_tokens,
        memory_mib=args.memory_mib,
        kv_precision=args.kv_precision,
        activations=args.activations,
        int8_activations=args.int8_activations,
        deterministic=args.deterministic,
        tensor_parallel=args.tensor_parallel,
    )
