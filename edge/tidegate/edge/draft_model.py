"""Opens the smaller bundle that guesses for a larger one (`tidegate serve --draft`).

Both must have the same tokenizer, byte for byte, or a guess would be about other tokens.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import cast

from tidegate.edge.executors.choice import ExecutorSettings, open_executor
from tidegate.edge.residency import DeviceExecutor, ResidentExecutor, open_again
from tidegate.engine.drafts_model import ModelDrafter
from tidegate.engine.executor import Executor, ExecutorLimits
from tidegate.errors import BundleError
from tidegate.model.bundle import Bundle

_TOKENIZER = "tokenizer.json"


def open_draft(
    folder: Path,
    target: Bundle,
    limits: ExecutorLimits,
    settings: ExecutorSettings,
    *,
    trusted: Set[str] | None = None,
    unloading: bool = False,
) -> tuple[Executor, ModelDrafter]:
    """Load the smaller model with room for as many requests as the larger one runs.

    Args:
        folder: of the smaller bundle.
        target: the larger bundle.
        limits: of the larger model's executor.
        settings: as for the larger model; a shorter context of the smaller one is no hindrance.
        trusted: as in `Bundle.open`.
        unloading: it can be unloaded and comes back when it is asked.

    Returns:
        Its executor, to be closed by the caller, and the drafter.

    Raises:
        BundleError: the smaller bundle is damaged, or its tokenizer is another one.
        ConfigError: a setting is out of range.
    """
    bundle = Bundle.open(folder, trusted=trusted, every_target=False)
    theirs, ours = (one.manifest.files.get(_TOKENIZER) for one in (bundle, target))
    if theirs is None or ours is None or theirs.sha256 != ours.sha256:
        raise BundleError(
            f"{folder}: {_TOKENIZER} is not that of {target.folder}: a draft model must have the"
            " same tokenizer"
        )
    context = min(limits.context_tokens, bundle.manifest.context_tokens)
    # The larger model's KV is what a budget is for, and what it came to is in the limits.
    wanted = replace(settings, context_tokens=context, rows=limits.step_rows, kv_mib=None)

    def load(verified: Bundle) -> DeviceExecutor:
        return cast(DeviceExecutor, open_executor(verified, wanted))

    executor = load(bundle)
    if unloading:
        executor = ResidentExecutor(executor, lambda: load(open_again(bundle, trusted)))
    return executor, ModelDrafter(executor, vocab=limits.vocab)
