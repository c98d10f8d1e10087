"""Statistics of the gradients of an activation, per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class ChannelCounts:
    """Statistics of the gradients in the backward pass of a normalisation with ``C`` channels.

    The gradients are those of the input of the activation. Each backward pass updates the statistics. A
    channel with non-finite gradients is left out of that update.

    Attributes:
        threshold: float32 ``[C]``; the next pass counts the elements whose ``|gradient|`` exceeds it.
            It is ``tau * rms / norm``. ``norm = sqrt(gamma^2 + beta^2)`` belongs to the channel, and ``rms``
            is the root mean square of ``|gradient| * norm`` over the live channels. Scaling a channel up and
            its readers down by the same factor changes no count.
        activity: float32 ``[C]``; exponential mean of the share of counted elements, in [0, 1].
        updates: float32 ``[1]``; number of passes in the means. ``mean / (1 - decay**updates)`` is
            unbiased.
        tau: factor of the threshold.
        decay: decay of the exponential means per pass, in [0, 1).
    """

    threshold: Tensor
    activity: Tensor
    updates: Tensor
    tau: float = 1.0
    decay: float = 0.99

    @staticmethod
    def zeros(channels: int, device: torch.device | str | None = None) -> ChannelCounts:
        """Empty statistics. The first pass counts nothing, because every threshold is infinite."""
        return ChannelCounts(
            threshold=torch.full((channels,), torch.inf, device=device),
            activity=torch.zeros(channels, device=device),
            updates=torch.zeros(1, device=device),
        )

    @staticmethod
    def of(arrays: Sequence[Tensor], tau: float, decay: float) -> ChannelCounts:
        """Statistics over existing arrays.

        Args:
            arrays: ``threshold``, ``activity`` and ``updates``, as :attr:`arrays` gives them.
            tau: factor of the threshold.
            decay: decay of the exponential means.
        """
        threshold, activity, updates = arrays
        return ChannelCounts(threshold, activity, updates, tau, decay)

    @property
    def arrays(self) -> list[Tensor]:
        """``threshold``, ``activity`` and ``updates``, as the ops take them."""
        return [self.threshold, self.activity, self.updates]
