"""Training towards a teacher: losses, the order of the text, and the steps of AdamW.

A run is a function of the models, the text, the schedule and its seed. The rate rises over a first
part and falls as a cosine to a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from tidegate.converters.passes.base import PassError, Progress
from tidegate.converters.training.sequences import Tokens, batched
from tidegate.converters.training.torch_model import Said, TorchModel
from tidegate.errors import ConfigError

_LAST_RATE = 0.1
"""Of the highest, at the end."""

_BETAS = (0.9, 0.95)
_GRADIENT_LIMIT = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and how fast."""

    steps: int
    learning_rate: float
    batch_tokens: int
    warmup: float
    """Share of the steps over which the rate rises."""
    weight_decay: float
    seed: int
    """Of the order of the text, the only randomness there is."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError("learning_rate", self.learning_rate, "above 0")
        if not 0 <= self.warmup <= 1:
            raise ConfigError("warmup", self.warmup, "from 0 to 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError("weight_decay", self.weight_decay, "at least 0")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "at least 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(self.steps - rising, 1)
        share = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * share


Loss = Callable[[Said, Sequence[Tokens]], torch.Tensor]
"""(what the student makes of a batch, the batch) -> a scalar to lower."""


def best_device() -> torch.device:
    """A GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    student: TorchModel,
    loss_of: Loss,
    sequences: Sequence[Tokens],
    schedule: Schedule,
    progress: Callable[[int], None],
) -> list[float]:
    """Train in place; the loss of every step.

    Raises:
        PassError: nothing is trained, or the loss is no longer a number.
    """
    parameters = student.parameters()
    if not parameters:
        raise PassError("nothing is trained: no role that matches has dense weights")
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=_BETAS, weight_decay=schedule.weight_decay
    )
    losses = []
    for step, batch in zip(range(schedule.steps), _batches(sequences, schedule), strict=False):
        progress(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(student(batch), batch)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise PassError(
                f"step {step}: the loss is no longer a number: learning_rate = "
                f"{schedule.learning_rate}: must be lower"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_LIMIT)
        optimizer.step()
    progress(schedule.steps)
    return losses


def reporter(kind: str, steps: int, progress: Progress) -> Callable[[int], None]:
    """`progress` for the steps of a pass."""
    return lambda step: progress(kind, step, steps)


def _batches(sequences: Sequence[Tokens], schedule: Schedule) -> Iterator[list[Tokens]]:
    """All the text again and again, every time in another order."""
    order = torch.Generator().manual_seed(schedule.seed)
    while True:
        shuffled = torch.randperm(len(sequences), generator=order).tolist()
        yield from batched((sequences[place] for place in shuffled), schedule.batch_tokens)


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean KL divergence of the teacher's next token from the student's, in nats.

    Both at a temperature, times its square so that gradients keep their size (Hinton et al. 2015,
    arXiv:1503.02531).
    """
    said = (student / temperature).log_softmax(dim=-1)
    meant = (teacher / temperature).log_softmax(dim=-1)
    total = functional.kl_div(said, meant, reduction="batchmean", log_target=True)
    return total * temperature**2


def next_token_loss(student: torch.Tensor, batch: Sequence[Tokens]) -> torch.Tensor:
    """Mean cross-entropy of the text's own next tokens; the last of a sequence has none."""
    targets = torch.tensor(
        [token for tokens in batch for token in (*tokens[1:], -1)], device=student.device
    )
    return functional.cross_entropy(student, targets, ignore_index=-1)


def stream_error(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared difference of the residual streams over their mean square in the teacher.

    Layer i of S is held against the teacher's layer at the same share of the depth.
    """
    errors = []
    for index, stream in enumerate(student):
        meant = teacher[mapped_layer(index, len(student), len(teacher))]
        errors.append(functional.mse_loss(stream, meant) / meant.square().mean())
    return torch.stack(errors).mean()


def mapped_layer(index: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher's layer, 0-based, at the depth of the student's layer `index`."""
    return max(round((index + 1) * teacher_layers / student_layers), 1) - 1
