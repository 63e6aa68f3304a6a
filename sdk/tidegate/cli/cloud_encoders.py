"""The flags of `tidegate cloud` for the encoders beside its language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.service import add_encoder_wait
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.cloud.encoders import EncodersSettings, NamedCheckpoint


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Declare which there are, and how their texts are batched."""
    for flag, makes in (("embedder", "embeddings at /v1/embeddings"), ("classifier", "/classify")):
        parser.add_argument(
            f"--{flag}",
            action="append",
            default=[],
            metavar="NAME=PATH",
            help=f"checkpoint of an encoder for {makes}; may be given several times",
        )
    add_encoder_wait(parser)
    parser.add_argument(
        "--encoder-rows", type=int, default=32, help="texts that an encoder runs at once"
    )
    parser.add_argument(
        "--encoder-tokens",
        type=int,
        default=2048,
        help="tokens of an encoder's run, the longest text times the texts (default 2048)",
    )
    parser.add_argument(
        "--encoder-threads",
        type=int,
        help="of an encoder on a CPU (default: half of the cores, the model runs on the others)",
    )
    parser.add_argument(
        "--encoder-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where encoders run (default: a CUDA device where there is one)",
    )


def read_encoders(args: argparse.Namespace) -> EncodersSettings:
    """Read what `add_encoders` declared.

    Raises:
        ConfigError: a value is not allowed.
    """
    from tidegate.cloud.encoder import TorchEncoderSettings
    from tidegate.cloud.encoders import EncodersSettings

    return EncodersSettings(
        embedders=tuple(_named("embedder", one) for one in args.embedder),
        classifiers=tuple(_named("classifier", one) for one in args.classifier),
        encoder=TorchEncoderSettings(
            batch_rows=args.encoder_rows,
            batch_tokens=args.encoder_tokens,
            threads=args.encoder_threads,
            device=args.encoder_device,
        ),
        wait_s=args.encoder_wait_ms / 1000,
    )


def _named(flag: str, value: str) -> NamedCheckpoint:
    from tidegate.cloud.encoders import NamedCheckpoint

    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise ConfigError(flag, value, "NAME=PATH, a model id and a checkpoint's folder")
    return NamedCheckpoint(name=name, path=Path(path))
