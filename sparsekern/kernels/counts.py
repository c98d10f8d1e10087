"""Statistics of the gradients that reach the channels of an activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class ChannelCounts:
    """What the backward pass of a normalisation with ``C`` channels keeps of its gradients.

    Its gradients are those of what enters the activation. Written by each backward pass; one with
    gradients that are not finite leaves the channels where they occur out.

    Attributes:
        threshold: float32 ``[C]``; what ``|gradient|`` has to exceed in the next pass to be counted.
            It is ``tau`` times the root mean square over the live channels of ``|gradient| * norm``,
            divided by the channel's ``norm = sqrt(gamma^2 + beta^2)``: rescaling a channel and what
            reads it the other way round changes no count.
        activity: float32 ``[C]``; exponential mean of the share of counted elements, in [0, 1].
        updates: float32 ``[1]``; passes that entered the means. ``mean / (1 - decay**updates)`` is
            unbiased.
        tau: factor of the threshold.
        decay: of the exponential means.
    """

    threshold: Tensor
    activity: Tensor
    updates: Tensor
    tau: float = 1.0
    decay: float = 0.99

    @staticmethod
    def zeros(channels: int, device: torch.device | str | None = None) -> ChannelCounts:
        """No statistics yet. The first pass counts nothing, for want of a threshold."""
        return ChannelCounts(
            threshold=torch.full((channels,), torch.inf, device=device),
            activity=torch.zeros(channels, device=device),
            updates=torch.zeros(1, device=device),
        )

    @staticmethod
    def of(arrays: Sequence[Tensor], tau: float, decay: float) -> ChannelCounts:
        """From :attr:`arrays` and the two numbers."""
        threshold, activity, updates = arrays
        return ChannelCounts(threshold, activity, updates, tau, decay)

    @property
    def arrays(self) -> list[Tensor]:
        """``threshold``, ``activity`` and ``updates``, as the ops take them."""
        return [self.threshold, self.activity, self.updates]
