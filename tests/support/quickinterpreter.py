"""Triton's interpreter without patching its language anew at every call of a device function.

A launch replaces the builtins of `triton.language` by interpreted ones. Each call of a device
function inside does so again: it walks hundreds of members, finds no builtin that is left, and
puts the same few functions where they are already. That is a third of the time of a launch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def patch_once(
    patch: Callable[[Any], Any], languages: Sequence[object]
) -> Callable[[Any], Any | None]:
    """`interpreter._patch_lang` that leaves alone what the launch around it has patched.

    Args:
        patch: Triton's own. It takes a kernel's function and gives a scope; a launch ends with
            `scope.restore()`, device functions drop theirs.
        languages: the modules that are patched where a function's globals hold them.
    """
    patched: list[object] = []
    """By the launch that runs; nothing outside of one."""

    @functools.cache
    def seen_by(function: Any) -> list[object]:
        modules = [one for one in function.__globals__.values() if inspect.ismodule(one)]
        return [one for one in modules if one in languages]

    def patch_lang(function: Any) -> Any | None:
        if patched and all(one in patched for one in seen_by(function)):
            return None
        scope = patch(function)
        if not patched:
            patched.extend(seen_by(function))
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        return scope

    return patch_lang


def install() -> None:
    """Let every launch of this process patch once; this imports Triton, for interpreting."""
    from triton.runtime import interpreter

    if interpreter._patch_lang.__module__ == interpreter.__name__:
        languages = (interpreter.tl, interpreter.tl.core)
        interpreter._patch_lang = patch_once(interpreter._patch_lang, languages)
