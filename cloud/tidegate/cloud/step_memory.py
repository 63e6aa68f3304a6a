"""`StepMemory`: what all steps of the GPU executor bring in and leave, allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidegate.cloud.draw_buffers import MOST_EDITS, DrawBuffers
from tidegate.cloud.gpu_settings import GpuSettings
from tidegate.cloud.step_buffers import StepBuffers
from tidegate.kernels.sampling.workspace import SamplingWorkspace

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StepMemory:
    """See `StepMemory.allocate`."""

    steps: StepBuffers
    draws: DrawBuffers
    sampling: SamplingWorkspace
    logits: Tensor
    """float32 [most logits, V], those of the last step first."""
    tokens: Tensor
    """int32 [most logits], what was chosen last, -1 where nothing could be."""
    chosen: list[Tensor]
    """Two of the same on the host, in turn: the first is the one that was submitted last."""

    @classmethod
    def allocate(
        cls, settings: GpuSettings, *, vocab: int, context_tokens: int, device: torch.device
    ) -> StepMemory:
        """Enough for every step; what is on the host is pinned for CUDA."""
        most, pinned = settings.step_logits, device.type == "cuda"
        return cls(
            steps=StepBuffers(
                rows=settings.rows,
                tokens=settings.step_tokens,
                logits=most,
                width=-(-context_tokens // settings.block_tokens),
                device=device,
            ),
            draws=DrawBuffers(rows=most, vocab=vocab, device=device),
            sampling=SamplingWorkspace.allocate(
                rows=most, vocab=vocab, edits=most * MOST_EDITS, device=device
            ),
            logits=torch.zeros((most, vocab), dtype=torch.float32, device=device),
            tokens=torch.zeros(most, dtype=torch.int32, device=device),
            chosen=[torch.zeros(most, dtype=torch.int32, pin_memory=pinned) for _ in range(2)],
        )

    @property
    def nbytes(self) -> int:
        """On the device, but for the sampling's workspace, which is small."""
        return self.steps.nbytes + self.logits.nbytes + self.draws.nbytes

    def addresses(self) -> tuple[int, ...]:
        """Where all of it lies, for tests that it stays there."""
        return (
            *self.steps.addresses(),
            *self.draws.addresses(),
            self.logits.data_ptr(),
            self.tokens.data_ptr(),
            *(one.data_ptr() for one in self.chosen),
        )
