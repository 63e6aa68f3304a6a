"""Train one of the two models: ``python -m assistant.train edge`` from the `examples` folder.

The run is a function of (shape, mix, seed, steps). Interrupted, it resumes from its last saved
state and takes the same steps; it uses CUDA when there is a GPU. Hidden matrices are trained by
Muon (Jordan et al. 2024), the embedding and the norms by AdamW. The rate warms up, stays, and
falls linearly over the last part, so a running training can be given more steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .batches import Batch, Mix, draw_batch
from .checkpoint import export, load, load_or_train_tokenizer
from .growth import grow
from .model import SHAPES, Llama, Shape, packed_mask

HERE: Final = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained."""

    steps: int
    seed: int = 1
    muon_rate: float = 1e-3
    adam_rate: float = 1e-3
    weight_decay: float = 0.02
    warm_up_steps: int = 50
    decay_steps: int = 300
    gradient_limit: float = 1.0
    save_every: int = 100
    log_every: int = 20


@dataclass(kw_only=True)
class Run:
    """A training run between two steps: everything that a resumed run needs."""

    model: Llama
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0
    next_seed: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    def state(self) -> dict[str, Any]:
        """Return the state to save."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "next_seed": self.next_seed,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.next_seed = state["step"], state["next_seed"]
        self.tokens, self.elapsed_s = state["tokens"], state["elapsed_s"]


def rate_share(step: int, recipe: Recipe) -> float:
    """Return the share of the full learning rate at a step: warm-up, plateau, linear decay."""
    rising = (step + 1) / recipe.warm_up_steps
    falling = (recipe.steps - step) / recipe.decay_steps
    return max(0.0, min(1.0, rising, falling))


def start_run(shape: Shape, recipe: Recipe, device: torch.device) -> Run:
    """Return a fresh run; all of its randomness is the seed of the initial weights."""
    torch.manual_seed(recipe.seed)
    model = Llama(shape).to(device)
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and "embed_tokens" not in name
        (hidden if is_hidden else rest).append(parameter)
    muon = torch.optim.Muon(
        hidden,
        lr=recipe.muon_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return Run(model=model, optimizers=(muon, adam), next_seed=recipe.seed * 100_000_000)


Hidden = Callable[[Tensor, Tensor], Tensor]


def batch_loss(model: Llama, hidden_of: Hidden, batch: Batch, device: torch.device) -> Tensor:
    """Return the mean loss over the answers' tokens; the head runs on those positions only."""
    ids, targets = batch.ids.to(device), batch.targets.to(device)
    mask = packed_mask(batch.segments.to(device))
    with torch.autocast(device.type, torch.bfloat16):
        hidden = hidden_of(ids, mask)
        learned = targets >= 0
        logits = model.logits(hidden[learned])
    return F.cross_entropy(logits.float(), targets[learned])


def take_step(run: Run, recipe: Recipe, mix: Mix, tokenizer: Tokenizer, hidden_of: Hidden) -> float:
    """Take one step and return its loss."""
    began = time.perf_counter()
    device = next(run.model.parameters()).device
    batch = draw_batch(tokenizer, mix, run.next_seed, step=run.step)
    share = rate_share(run.step, recipe)
    for optimizer, rate in zip(run.optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * share
    loss = batch_loss(run.model, hidden_of, batch, device)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.gradient_limit)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    run.step += 1
    run.next_seed = batch.next_seed
    run.tokens += int((batch.segments > 0).sum())
    run.elapsed_s += time.perf_counter() - began
    return float(loss.detach())


def save_state(run: Run, path: Path) -> None:
    """Save a run so that an interruption leaves either the old state or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    torch.save(run.state(), scratch)
    os.replace(scratch, path)


def train(
    run: Run,
    recipe: Recipe,
    mix: Mix,
    tokenizer: Tokenizer,
    *,
    state_path: Path,
    log_path: Path,
    until: int | None = None,
    compiled: bool = False,
) -> None:
    """Train to the recipe's last step or `until` an earlier one, saving and logging on the way."""
    last = recipe.steps if until is None else min(until, recipe.steps)
    hidden_of: Hidden = run.model.model
    if compiled:
        hidden_of = torch.compile(run.model.model, dynamic=False)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    while run.step < last:
        loss = take_step(run, recipe, mix, tokenizer, hidden_of)
        if run.step % mix.long_every:
            losses.append(loss)
        if run.step % recipe.log_every == 0 or run.step == last:
            line = {
                "step": run.step,
                "loss": round(sum(losses) / max(1, len(losses)), 5),
                "tokens": run.tokens,
                "elapsed_s": round(run.elapsed_s, 1),
            }
            with log_path.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
            losses.clear()
        if run.step % recipe.save_every == 0 or run.step == last:
            save_state(run, state_path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--until", type=int, help="stop at this step, to go on another time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay-steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--tier-weights", type=float, nargs=4, default=Mix.tier_weights)
    parser.add_argument("--easy-steps", type=int, default=500, help="steps on tiers 1 and 2 only")
    parser.add_argument("--drill-share", type=float, default=0.0, help="share of number work")
    parser.add_argument("--long-every", type=int, default=Mix.long_every)
    parser.add_argument("--long-rows", type=int, nargs=2, help="of a long table")
    parser.add_argument("--long-sensors", type=int, nargs="+", default=Mix.long_table_sensors)
    parser.add_argument("--grow-from", type=Path, help="start as this smaller checkpoint")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--state", type=Path, default=HERE / ".state")
    parser.add_argument("--output", type=Path, help="checkpoint folder, default: the model's name")
    return parser.parse_args()


def main() -> None:
    """Train or resume one model, then export it."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(
        steps=arguments.steps,
        seed=arguments.seed,
        muon_rate=arguments.rate,
        adam_rate=arguments.rate,
        decay_steps=arguments.decay_steps,
    )
    is_edge = arguments.name == "edge"
    mix = Mix(
        tier_weights=tuple(arguments.tier_weights),
        easy_steps=arguments.easy_steps,
        drill_share=arguments.drill_share,
        long_every=arguments.long_every,
        rows=arguments.rows,
        row_tokens=arguments.row_tokens,
        long_row_tokens=512 if is_edge else 1024,
        long_table_rows=tuple(arguments.long_rows or ((40, 75) if is_edge else (110, 160))),
        long_table_sensors=tuple(arguments.long_sensors),
    )
    tokenizer = load_or_train_tokenizer(arguments.state / "tokenizer.json")
    run = start_run(SHAPES[arguments.name], recipe, device)
    state_path = arguments.state / f"{arguments.name}.pt"
    if state_path.exists():
        run.restore(torch.load(state_path, map_location=device, weights_only=True))
    elif arguments.grow_from:
        small, _ = load(arguments.grow_from)
        grow(small.to(device), run.model)
    log_path = arguments.state / f"{arguments.name}.jsonl"
    train(
        run,
        recipe,
        mix,
        tokenizer,
        state_path=state_path,
        log_path=log_path,
        until=arguments.until,
        compiled=arguments.compile,
    )
    export(run.model, tokenizer, arguments.output or HERE / arguments.name)


if __name__ == "__main__":
    main()
