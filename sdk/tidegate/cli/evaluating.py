"""Measures a bundle against its checkpoint, through the executor that a device would use.

The text is plain text, or JSON lines: `{"text": ...}`, or `{"messages": [...]}` with an `"answer"`
that is right. Answers make it a task too: the share that greedy decoding gives to the letter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tidegate.converters.evaluation.measures import Positions, compare, summarise
from tidegate.converters.evaluation.reference import reference_logits
from tidegate.edge.executors.choice import Choice, ExecutorSettings, open_executor
from tidegate.edge.scoring import greedy_answers, teacher_forced
from tidegate.engine.executor import Executor
from tidegate.engine.text import TextModel
from tidegate.errors import ConfigError, RequestError
from tidegate.model.bundle import Bundle
from tidegate.model.checkpoint import Checkpoint
from tidegate.model.quality import Quality

Progress = Callable[[str, int, int], None]

_ROWS = 8
_SLACK_TOKENS = 4
"""An answer that is so much longer than every right one is wrong: it is not waited for."""
_ANY = 1 << 40


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What to measure with."""

    executor: Choice = "auto"
    exact: bool = False
    """Float activations in the bundle: what is left is the weights' rounding."""
    tokens: int = 20_000
    """At most so many of the text."""
    sequence_tokens: int = 512
    """Longer texts are cut into pieces of this length."""
    tasks: int = 200
    """At most so many answers are generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationText:
    """A text as tokens."""

    name: str
    sha256: str
    sequences: tuple[tuple[int, ...], ...]
    tasks: tuple[tuple[tuple[int, ...], str], ...]
    """Prompts and the answers that are right."""
    longest_answer_tokens: int
    """Of the right ones, and a few more."""


def evaluate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    text_file: Path,
    settings: EvaluationSettings,
    progress: Progress,
) -> Quality:
    """Measure a decoder's bundle.

    Raises:
        ConfigError: the text cannot be read or has no position to measure.
        BundleError: the bundle is an encoder's, or has no target for the executor.
    """
    context = min(bundle.manifest.context_tokens, checkpoint.decoder.context)
    text, model = read_pieces(bundle, text_file, settings), text_model(bundle)
    longest = max(len(one) for one in text.sequences)
    asked = max((len(prompt) for prompt, _ in text.tasks), default=0)
    if asked >= context:
        raise ConfigError("text", f"a prompt of {asked} tokens", f"below the context of {context}")
    room = asked + text.longest_answer_tokens
    executor = open_executor(
        bundle,
        ExecutorSettings(
            choice=settings.executor,
            context_tokens=min(max(longest, room), context),
            rows=_ROWS,
            exact=settings.exact,
        ),
    )
    try:
        quality = _measure(checkpoint, text, executor, progress)
        if not text.tasks:
            return quality
        return _with_tasks(quality, checkpoint, text, model, executor, progress)
    finally:
        executor.close()


def _measure(
    checkpoint: Checkpoint,
    text: EvaluationText,
    executor: Executor,
    progress: Progress,
) -> Quality:
    reference = reference_logits(checkpoint.decoder, checkpoint.weights(), text.sequences)
    found = teacher_forced(executor, text.sequences)
    parts: list[Positions] = []
    for expected, got, tokens in zip(reference, found, text.sequences, strict=True):
        parts.append(compare(expected, got, tokens[1:]))
        progress("measure", len(parts), len(text.sequences))
    summary = summarise(parts)
    return Quality(
        text=text.name,
        text_sha256=text.sha256,
        positions=summary.positions,
        backend=type(executor).__name__.removesuffix("Executor").lower(),
        reference="checkpoint in float32",
        perplexity=summary.perplexity,
        reference_perplexity=summary.reference_perplexity,
        kl_mean=summary.kl_mean,
        kl_p99=summary.kl_p99,
        agreement=summary.agreement,
        confidence=summary.confidence,
    )


def _with_tasks(
    quality: Quality,
    checkpoint: Checkpoint,
    text: EvaluationText,
    model: TextModel,
    executor: Executor,
    progress: Progress,
) -> Quality:
    from tidegate.cloud.torch_executor import TorchExecutor, TorchSettings

    context = executor.limits.context_tokens
    parent = TorchExecutor(
        checkpoint.decoder,
        checkpoint.weights(),
        TorchSettings(slots=_ROWS, context_tokens=context),
    )
    try:
        return replace(
            quality,
            exact_match=_exact_match(executor, model, text, "answers", progress),
            reference_exact_match=_exact_match(parent, model, text, "reference answers", progress),
        )
    finally:
        parent.close()


def _exact_match(
    executor: Executor, model: TextModel, text: EvaluationText, what: str, progress: Progress
) -> float:
    prompts = [prompt for prompt, _ in text.tasks]
    answers = greedy_answers(
        executor, prompts, longest=text.longest_answer_tokens, ends=model.eos_ids
    )
    right = 0
    for done, (tokens, (_, answer)) in enumerate(zip(answers, text.tasks, strict=True)):
        right += model.decode(tokens) == answer
        progress(what, done + 1, len(prompts))
    return right / len(prompts)


def text_model(bundle: Bundle) -> TextModel:
    """The bundle's tokenizer, for texts of any length."""
    return TextModel.load(bundle.folder, context_tokens=_ANY, max_prompt_chars=_ANY)


def read_pieces(bundle: Bundle, path: Path, settings: EvaluationSettings) -> EvaluationText:
    """Read a text and cut it to pieces that the bundle's context can hold."""
    pieces = min(settings.sequence_tokens, bundle.manifest.context_tokens)
    return read_text(path, text_model(bundle), replace(settings, sequence_tokens=pieces))


def read_text(path: Path, model: TextModel, settings: EvaluationSettings) -> EvaluationText:
    """Read and tokenise a text file; `ConfigError` names the file and what is wrong in it."""
    try:
        raw = path.read_bytes()
        content = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", str(path), f"a readable UTF-8 file ({error})") from error
    tasks: list[tuple[tuple[int, ...], str]] = []
    if path.suffix == ".jsonl":
        found = list(_read_lines(path, content, model, tasks))
    else:
        found = [_encode(path, 1, model, content)]
    sequences = _cut(found, settings)
    if not sequences:
        raise ConfigError("text", str(path), "a text of two tokens or more")
    return EvaluationText(
        name=path.name,
        sha256=hashlib.sha256(raw).hexdigest(),
        sequences=tuple(sequences),
        tasks=tuple(tasks[: settings.tasks]),
        longest_answer_tokens=_SLACK_TOKENS
        + max((len(_encode(path, 0, model, answer)) for _, answer in tasks), default=0),
    )


def _read_lines(
    path: Path, content: str, model: TextModel, tasks: list[tuple[tuple[int, ...], str]]
) -> Iterator[tuple[int, ...]]:
    """Tokens of every line; questions with an answer are appended to `tasks` as well."""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            body = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _refused(path, number, "JSON") from error
        if not isinstance(body, dict):
            raise _refused(path, number, 'an object with "text" or "messages"')
        if isinstance(body.get("text"), str):
            yield _encode(path, number, model, body["text"])
            continue
        messages, answer = body.get("messages"), body.get("answer", "")
        if not isinstance(messages, list) or not isinstance(answer, str):
            raise _refused(path, number, 'an object with "text" or "messages"')
        try:
            prompt = tuple(model.encode_chat(messages))
        except (RequestError, KeyError, TypeError) as error:
            raise _refused(
                path, number, f"a chat that the model's template takes: {error}"
            ) from error
        if answer:
            tasks.append((prompt, answer))
        yield prompt + (_encode(path, number, model, answer) if answer else ())


def _encode(path: Path, line: int, model: TextModel, text: str) -> tuple[int, ...]:
    try:
        return model.encode_prompt(text)
    except RequestError as error:
        raise _refused(path, line, f"a text that can be tokenised: {error}") from error


def _cut(found: Sequence[tuple[int, ...]], settings: EvaluationSettings) -> list[tuple[int, ...]]:
    """Pieces of two tokens or more, as many as `settings.tokens` allows."""
    pieces: list[tuple[int, ...]] = []
    room = settings.tokens
    for sequence in found:
        for start in range(0, len(sequence), settings.sequence_tokens):
            piece = sequence[start : start + settings.sequence_tokens][:room]
            if len(piece) >= 2:
                pieces.append(piece)
                room -= len(piece)
    return pieces


def _refused(path: Path, line: int, allowed: str) -> ConfigError:
    return ConfigError("text", f"{path.name}, line {line}", allowed)
