"""The yardstick of memory traffic: torch's own passes with 4 reads and 3 writes in place, as AdamW has."""

from __future__ import annotations

import torch

# Elements of each of 4 float32 arrays: 68 MB, more than caches hold. Not a power of two: arrays that lie
# multiples of 4 KiB apart get into each other's way in a cache, at a fifth of the bandwidth.
ELEMENTS = 17_000_000
# Reads and writes of 4 bytes for each of them.
ACCESSES = 7


class Stream:
    """Four arrays much larger than caches, and passes over them: ``w += g``, ``m *= c``, ``v *= c``.

    Together they read and write what AdamW does. Copying would show half: the line that is written is
    fetched before, which in-place passes need not pay for.
    """

    def __init__(self, device: torch.device, elements: int = ELEMENTS) -> None:
        self._w, self._m, self._v, self._g = (torch.ones(elements, device=device) for _ in range(4))

    def __call__(self) -> None:
        self._w.add_(self._g)
        self._m.mul_(1.0)
        self._v.mul_(1.0)
