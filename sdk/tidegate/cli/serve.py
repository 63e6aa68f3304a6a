"""Run the device daemon on a bundle.

Example:
  tidegate serve assistant --listen 127.0.0.1:8080
  tidegate serve assistant --link mqtt://broker.local:1883 --keys /var/lib/tidegate/device
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tidegate.cli.board import Served, add_profile, describe, read_profile, served
from tidegate.cli.energy_flags import add_energy, read_energy
from tidegate.cli.link_http import add_gateway_urls
from tidegate.cli.logs import LOG_FORMATS, add_log_format
from tidegate.cli.service import (
    LinkFlags,
    ServiceFlags,
    add_encoder_wait,
    add_link,
    add_service,
    read_service,
)
from tidegate.cli.trust import add_trust, read_trust

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tidegate.edge.energy.profile import Profile
    from tidegate.edge.executors.choice import ExecutorSettings
    from tidegate.edge.link_settings import LinkSettings
    from tidegate.edge.settings import EdgeSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    _add_service(parser)
    _add_model(parser)
    _add_caches(parser)
    _add_guessing(parser)
    _add_memory(parser)
    add_energy(parser)
    add_trust(parser)
    add_link(parser, end="device", broker="to the cloud")
    add_gateway_urls(parser)


def _add_service(parser: argparse.ArgumentParser) -> None:
    """What is served, where, and to whom."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    add_service(parser, listen="127.0.0.1:8080")
    add_log_format(parser)
    parser.add_argument("--queue", type=int, default=32, help="requests that may wait (default 32)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """How the model runs."""
    add_profile(parser, "how to run and what to take where no flag does")
    parser.add_argument(
        "--executor",
        choices=("auto", "onnx", "openvino"),
        help="what runs the model (default: the fastest that the bundle holds)",
    )
    parser.add_argument("--context", type=int, help="prompt plus answer of one request, in tokens")
    parser.add_argument(
        "--context-policy",
        choices=("error", "truncate_oldest", "truncate_middle"),
        default="error",
        help="for longer prompts of callers who do not say (default: refuse, or let them overflow)",
    )
    parser.add_argument("--rows", type=int, help="requests that run at once (default 4)")
    parser.add_argument("--threads", type=int, help="threads (default: the runtime's choice)")
    parser.add_argument(
        "--providers",
        metavar="NAMES",
        help="execution providers of ONNX Runtime by preference: cpu, cuda, tensorrt, with commas"
        " (default: cpu)",
    )
    parser.add_argument(
        "--kv-precision",
        choices=("u8", "u4", "f16", "f32"),
        help="bits of keys and values (default: the smallest that loses little)",
    )
    parser.add_argument(
        "--native",
        choices=("auto", "on", "off"),
        default="auto",
        help="multiply by the compiled layer of tidegate-native (default: where it can run)",
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="folder to keep re-tiled weights in for the next start"
    )
    parser.add_argument("--exact", action="store_true", help="float activations, to compare with")


def _add_caches(parser: argparse.ArgumentParser) -> None:
    """What is kept of prompts and answers."""
    parser.add_argument(
        "--embedder", type=Path, metavar="BUNDLE", help="encoder that answers /v1/embeddings"
    )
    parser.add_argument(
        "--classifier", type=Path, metavar="BUNDLE", help="encoder with labels, for /classify"
    )
    add_encoder_wait(parser)
    parser.add_argument(
        "--semantic-cache",
        type=float,
        metavar="COSINE",
        help="give an earlier answer to a question that means the same; needs --embedder",
    )
    parser.add_argument(
        "--prefix-cache",
        type=Path,
        metavar="DIR",
        help="keep computed beginnings of prompts there, encrypted, so that they survive a restart",
    )
    parser.add_argument(
        "--prefix-cache-mib", type=int, default=1024, help="its largest size (default 1024)"
    )
    parser.add_argument(
        "--no-prefix-cache",
        action="store_true",
        help="compute every prompt from its first token, neither memory nor disk reused",
    )


def _add_guessing(parser: argparse.ArgumentParser) -> None:
    """Speculative decoding."""
    parser.add_argument(
        "--draft",
        type=Path,
        metavar="BUNDLE",
        help="smaller model with the same tokenizer that guesses too, where that is faster",
    )
    parser.add_argument(
        "--no-speculation",
        action="store_true",
        help="never guess tokens ahead; the answers are the same (by default they are guessed where"
        " measured steps promise a gain, and hardly looked for where they do not)",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """What it may take, and what happens when nothing moves."""
    parser.add_argument(
        "--memory-mib",
        type=int,
        metavar="N",
        help="refuse to start with more than this (default: what the system has available)",
    )
    parser.add_argument(
        "--kv-mib",
        type=int,
        metavar="N",
        help="most that the model's keys and values may take (default: rows times context)",
    )
    parser.add_argument(
        "--max-model-mib",
        type=int,
        metavar="N",
        help="refuse bundles whose weights take more than this together",
    )
    parser.add_argument(
        "--unload-after",
        type=float,
        metavar="SECONDS",
        help="let the model leave memory after so long without work, a draft or embedding model"
        " stays; the next request loads it again",
    )
    parser.add_argument(
        "--restart-when-stuck",
        action="store_true",
        help="exit with status 70 when work makes no progress, for a supervisor to start it again",
    )


def run(args: argparse.Namespace) -> int:
    """Open the bundle, then serve until SIGTERM or SIGINT."""
    from tidegate.cli.listen import announce, run_until_signal
    from tidegate.edge.daemon import open_edge

    profile = None if args.profile is None else read_profile(args.profile)
    settings = _settings(args, read_service(args), _served(args, profile), profile)

    async def main(stop: asyncio.Event) -> None:
        async with open_edge(settings) as edge:
            facts = edge.engine.executor_facts
            if facts is not None:
                line = f"tidegate serve: {facts.runtime}, products by {facts.linear}"
                if args.log_format == "text":
                    print(line, file=sys.stderr)
                else:
                    _log.info(line)
            announce(f"tidegate serve: {edge.engine.model_id} on {edge.server.url}")
            await edge.run(stop)

    return run_until_signal(main, formatter=LOG_FORMATS[args.log_format]())


def _served(args: argparse.Namespace, profile: Profile | None) -> Served:
    """What flags and profile say of how to run, and of what to take."""
    from tidegate.edge.machine import read_machine

    taken = served(args, profile, read_machine().memory_bytes)
    if profile is not None:
        print(f"tidegate serve: profile {describe(profile, taken)}", file=sys.stderr)
    return taken


def _settings(
    args: argparse.Namespace, service: ServiceFlags, taken: Served, profile: Profile | None
) -> EdgeSettings:
    """Everything that the flags say, and the profile where they do not."""
    from tidegate.edge.settings import EdgeSettings

    return EdgeSettings(
        bundle=args.bundle,
        host=service.host,
        port=service.port,
        api_key_hashes=service.api_key_hashes,
        tls=service.tls,
        traces=service.traces,
        executor=_executor(args, taken),
        queue_limit=args.queue,
        energy=read_energy(args, profile),
        context_policy=args.context_policy,
        embedder=args.embedder,
        classifier=args.classifier,
        encoder_wait_s=args.encoder_wait_ms / 1000,
        semantic_cache=args.semantic_cache,
        prefix_reuse=not args.no_prefix_cache,
        speculation=not args.no_speculation,
        draft=args.draft,
        prefix_cache=args.prefix_cache,
        prefix_cache_mib=args.prefix_cache_mib,
        memory_mib=taken.memory_mib,
        max_model_mib=taken.max_model_mib,
        unload_after_s=args.unload_after,
        restart_when_stuck=args.restart_when_stuck,
        trusted_signers=read_trust(args.trust),
        link=None if service.link is None else _link(args, service.link),
    )


def _executor(args: argparse.Namespace, taken: Served) -> ExecutorSettings:
    from tidegate.edge.executors.choice import ExecutorSettings

    return ExecutorSettings(
        choice=taken.executor,
        context_tokens=args.context,
        rows=taken.rows,
        threads=taken.threads,
        exact=args.exact,
        kv_precision=taken.kv_precision,
        native=args.native,
        cache_dir=args.cache_dir,
        providers=taken.providers,
        kv_mib=taken.kv_mib,
    )


def _link(args: argparse.Namespace, flags: LinkFlags) -> LinkSettings:
    from tidegate.edge.link_settings import LinkSettings

    return LinkSettings(
        broker=flags.broker,
        keys=flags.keys,
        broker_check=flags.broker_check,
        suites=flags.suites,
        http=tuple(args.link_http),
        http_after_s=args.link_http_after,
        http_learn=not args.link_http_given_only,
        http_plain=args.link_http_plain,
    )
