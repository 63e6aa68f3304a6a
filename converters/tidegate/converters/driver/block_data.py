"""`BlockStatistics`: what calibration text looks like inside a block, of its present weights.

A statistic is collected when it is asked for and kept until a weight changes that it depends on:
the input of `down` depends on `gate` and `up`, that of `q` on the norm before it. A run stops as
soon as it has seen what it is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from tidegate.converters.driver.block_walk import Batch, BlockWalk
from tidegate.converters.driver.dependencies import depth_of, input_of, upstream
from tidegate.converters.passes.base import Block
from tidegate.kernels.torch_ops import Tensor, WeightTensors
from tidegate.model.blocks import EMBED, FINAL
from tidegate.model.encoder import EncoderArchitecture
from tidegate.model.packed import Array, Linear
from tidegate.model.registry import AnyArchitecture
from tidegate.model.walk import Weights

SAMPLE_ROWS = 512
"""Rows that passes compare outputs on."""

_GRAMS_BYTES = 1 << 28
"""Grams that one run collects, and that are kept beside what the next run collects: those of many
small experts together, of a wide layer alone."""


@dataclass(kw_only=True, eq=False)
class _Moments:
    """Sums over all rows that entered a layer, and a sample of them."""

    rows: int = 0
    squares: Tensor | None = None
    magnitudes: Tensor | None = None
    peak: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, sample: Tensor) -> None:
        magnitude = x.abs()
        squares, magnitudes = (
            x.square().sum(0, dtype=torch.float64),
            magnitude.sum(0, dtype=torch.float64),
        )
        peak = magnitude.amax(0)
        self.squares = squares if self.squares is None else self.squares + squares
        self.magnitudes = magnitudes if self.magnitudes is None else self.magnitudes + magnitudes
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.rows += len(x)
        self.sample.append(sample)


@dataclass(kw_only=True, eq=False)
class _Gram:
    """The sum of outer products of all rows that entered a layer."""

    rows: int = 0
    total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        if self.total is None:
            self.total = torch.zeros(x.shape[1], x.shape[1])
        self.total.addmm_(x.T, x)
        self.rows += len(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Known:
    """A statistic and the weights it was made with."""

    value: _Moments | Tensor | None
    """None when no token reached the layer."""
    made_with: tuple[object, ...]


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Everything that a run is for was seen."""


class _See(Protocol):
    """Told the rows `x` that enter a layer, of a batch that begins at token `first`."""

    def __call__(self, source: str, x: Tensor, *, first: int, tokens: int) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class _Watch:
    """Waits for the layers that are wanted, once each, and stops the run after the last."""

    wanted: dict[int, str]
    """Roles by the identity of their weight."""
    see: Callable[[str, Tensor], None]

    def __call__(self, linear: Linear, rows: Tensor) -> None:
        source = self.wanted.pop(id(linear), None)
        if source is not None:
            self.see(source, rows)
            if not self.wanted:
                raise _Enough


class BlockStatistics:
    """`tidegate.converters.passes.base.BlockData` of one block."""

    def __init__(
        self,
        block: Block,
        arch: AnyArchitecture,
        batches: Sequence[Batch],
        inputs: Callable[[], Iterator[Tensor]],
        rest: Weights,
    ) -> None:
        """Look at a block.

        Args:
            block: whose weights passes change.
            arch: of the model.
            batches: of calibration text.
            inputs: gives what enters the block, batch by batch.
            rest: weights that lie in other blocks, for a head that is the embedding.
        """
        self._block, self._arch, self._batches = block, arch, batches
        self._read_inputs, self._rest = inputs, rest
        self._tensors = _Tensors()
        self._known: dict[tuple[str, str], _Known] = {}
        tokens = sum(len(sequence) for batch in batches for sequence in batch)
        self._tokens = tokens
        self._stride = max(tokens // SAMPLE_ROWS, 1)

    def rows(self, role: str) -> Tensor:
        """See `BlockData`."""
        return torch.cat(self._moments(role).sample)

    def mean_square(self, role: str) -> Tensor:
        """See `BlockData`."""
        moments = self._moments(role)
        assert moments.squares is not None
        return (moments.squares / moments.rows).float()

    def mean_abs(self, role: str) -> Tensor:
        """See `BlockData`."""
        moments = self._moments(role)
        assert moments.magnitudes is not None
        return (moments.magnitudes / moments.rows).float()

    def peak(self, role: str) -> Tensor:
        """See `BlockData`."""
        peak = self._moments(role).peak
        assert peak is not None
        return peak

    def gram(self, role: str) -> Tensor:
        """See `BlockData`; the caller must not change it."""
        source = self._source(role)
        if self._fresh("gram", source) is None:
            self._collect_grams(source)
        known = self._known["gram", source]
        if not isinstance(known.value, Tensor):
            raise _unreached(role)
        return known.value

    def inputs(self) -> Iterator[Tensor]:
        """See `BlockData`."""
        if self._block.name == EMBED:
            raise LookupError("embed: has no input but tokens")
        return self._read_inputs()

    def outputs(self) -> Iterator[Tensor]:
        """See `BlockData`; of a decoder's `final`, logits sequence by sequence."""
        self._tensors.keep_only(self._block)
        for batch, x in self._steps():
            if self._block.name != FINAL or x is None or self._is_encoder:
                yield self._run(batch, x, None)
                continue
            parts = torch.split_with_sizes(x, [len(sequence) for sequence in batch])
            for sequence, part in zip(batch, parts, strict=True):
                yield self._run((sequence,), part, None)

    @property
    def _is_encoder(self) -> bool:
        return isinstance(self._arch, EncoderArchitecture)

    def _moments(self, role: str) -> _Moments:
        source = self._source(role)
        if self._fresh("moments", source) is None:
            self._collect_moments(source)
        value = self._known["moments", source].value
        if not isinstance(value, _Moments):
            raise _unreached(role)
        return value

    def _source(self, role: str) -> str:
        """The role under which the statistics of this one's input are kept."""
        if role not in self._block.linears:
            raise LookupError(f"{role}: is not in block {self._block.name}")
        if self._block.name == EMBED:
            raise _unreached(role)
        return input_of(role, self._block.linears)

    def _sources(self) -> list[str]:
        return list(dict.fromkeys(input_of(role, self._block.linears) for role in self._roles()))

    def _roles(self) -> list[str]:
        return list(self._block.linears)

    def _made_with(self, source: str) -> tuple[object, ...]:
        weights: dict[str, object] = {**self._block.linears, **self._block.vectors}
        return tuple(weights[name] for name in upstream(source, list(weights), self._arch))

    def _fresh(self, kind: str, source: str) -> _Known | None:
        known = self._known.get((kind, source))
        if known is None:
            return None
        now = self._made_with(source)
        same = all(one is other for one, other in zip(known.made_with, now, strict=True))
        return known if same else None

    def _collect_moments(self, wanted: str) -> None:
        """Of the wanted layer, and of those that the run passes on the way there."""
        depth = depth_of(wanted, self._arch)
        passed = [one for one in self._sources() if depth_of(one, self._arch) <= depth]
        stale = [one for one in passed if self._fresh("moments", one) is None]
        found: dict[str, _Moments] = {}

        def see(source: str, x: Tensor, *, first: int, tokens: int) -> None:
            found.setdefault(source, _Moments()).add(x, self._sample(x, first, tokens))

        self._observe(stale, see)
        for source in stale:
            self._keep("moments", source, found.get(source))

    def _collect_grams(self, wanted: str) -> None:
        """Of the wanted layer, and of others at the same depth while they are small together."""
        depth = depth_of(wanted, self._arch)
        together, nbytes = [wanted], 0
        for source in self._sources():
            if (
                source != wanted
                and depth_of(source, self._arch) == depth
                and self._fresh("gram", source) is None
            ):
                nbytes += self._block.linears[source].inputs ** 2 * 4
                if nbytes <= _GRAMS_BYTES:
                    together.append(source)
        self._drop_grams(together)
        found: dict[str, _Gram] = {}

        def see(source: str, x: Tensor, *, first: int, tokens: int) -> None:
            found.setdefault(source, _Gram()).add(x)

        self._observe(together, see)
        for source in together:
            gram = found.pop(source, None)
            total = None
            if gram is not None and gram.total is not None:
                total = gram.total.div_(gram.rows)
            self._keep("gram", source, total)

    def _drop_grams(self, wanted: Sequence[str]) -> None:
        """Let go the grams that will be collected anew, and all others if they are large."""
        kept = [known.value for (kind, _), known in self._known.items() if kind == "gram"]
        large = sum(one.nbytes for one in kept if isinstance(one, Tensor)) > _GRAMS_BYTES
        for kind, source in list(self._known):
            if kind == "gram" and (large or source in wanted):
                del self._known[kind, source]

    def _keep(self, kind: str, source: str, value: _Moments | Tensor | None) -> None:
        self._known[kind, source] = _Known(value=value, made_with=self._made_with(source))

    def _sample(self, x: Tensor, first: int, tokens: int) -> Tensor:
        """Some rows of `x`: of a layer that sees all tokens, always those of the same tokens."""
        if len(x) == tokens:
            return x[-first % self._stride :: self._stride].clone()
        share = -(-SAMPLE_ROWS * tokens // self._tokens)
        return x[:: max(len(x) // share, 1)][:share].clone()

    def _observe(self, sources: Sequence[str], see: _See) -> None:
        """Run the block and show `see` what enters the layers `sources`."""
        self._tensors.keep_only(self._block)
        first = 0
        for batch, x in self._steps():
            tokens = sum(map(len, batch))
            watch = _Watch(
                wanted={id(self._block.linears[source]): source for source in sources},
                see=partial(see, first=first, tokens=tokens),
            )
            with contextlib.suppress(_Enough):
                self._run(batch, x, watch)
            first += tokens

    def _steps(self) -> Iterator[tuple[Batch, Tensor | None]]:
        if self._block.name == EMBED:
            yield from ((batch, None) for batch in self._batches)
            return
        yield from zip(self._batches, self._read_inputs(), strict=True)

    def _run(
        self, batch: Batch, x: Tensor | None, seen: Callable[[Linear, Tensor], None] | None
    ) -> Tensor:
        walk = BlockWalk(arch=self._arch, block=self._block.name, batch=batch)
        return walk.run(x, _BlockWeights(self._block, self._rest), self._tensors, seen)


class _Tensors(WeightTensors):
    """Lets go what a pass has replaced."""

    def keep_only(self, block: Block) -> None:
        present = {id(linear) for linear in block.linears.values()}
        self._tensors = {key: kept for key, kept in self._tensors.items() if key in present}


@dataclass(frozen=True, eq=False)
class _BlockWeights:
    """`tidegate.model.walk.Weights` of a block, and of the others where it leans on them."""

    block: Block
    rest: Weights

    def linear(self, role: str) -> Linear:
        found = self.block.linears.get(role)
        return self.rest.linear(role) if found is None else found

    def vector(self, role: str) -> Array:
        found = self.block.vectors.get(role)
        return self.rest.vector(role) if found is None else found


def _unreached(role: str) -> LookupError:
    return LookupError(f"{role}: no calibration token reached it")
