"""Fetches a checkpoint from the Hugging Face Hub when it is named by its id, such as `org/name`.

Only what a conversion reads is fetched: configuration, tokenizer, templates and safetensors; never
a pickle. It lies in the hub's own cache, so a second conversion fetches nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

from tidegate.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "*_Pooling/config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""Patterns over the paths of a repository."""

_NOT_OURS = ("*/*.safetensors", "consolidated*", "adapter_*")
"""Weights of other formats and precisions that some repositories keep beside."""


def find_checkpoint(name: str) -> Path:
    """The folder `name`, or the hub's checkpoint of that id, fetched if it is not in the cache.

    Raises:
        CheckpointError: there is no such folder, and the id is unknown or cannot be fetched.
    """
    folder = Path(name)
    beside_others = len(folder.parts) > 1 and folder.parent.is_dir()  # a folder, misspelt
    if folder.exists() or beside_others or not _ID.fullmatch(name):
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{name}: is no folder, and fetching it needs the package huggingface-hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES], ignore_patterns=[*_NOT_OURS]))
    except LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached, and it is not in the cache"
        raise CheckpointError(f"{name}: is no folder, and {reason}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = {401: "does not exist or needs a login", 403: "needs its owner's leave"}.get(
            status, "does not exist" if status == 404 else f"was refused (HTTP {status})"
        )
        raise CheckpointError(f"{name}: is no folder, and on the hub it {reason}") from error
    except OSError as error:  # no connection at all, or no room in the cache
        raise CheckpointError(f"{name}: cannot be fetched: {error}") from error


def model_name(name: str, folder: Path) -> str:
    """What to call a model by default: the last part of its id or folder."""
    return folder.resolve().name if Path(name).exists() else name.rpartition("/")[2]
