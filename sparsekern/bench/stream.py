"""The yardstick of memory traffic: torch's own passes with 4 reads and 3 writes in place, as AdamW has."""

from __future__ import annotations

import torch

# Elements of each of 4 float32 arrays: 64 MiB, more than the caches of a core hold.
ELEMENTS = 2**24
ACCESSES = 7


class Stream:
    """Four arrays much larger than caches, and passes over them: ``w += g``, ``m *= c``, ``v *= c``.

    Together they read and write what AdamW does. Copying would show half: the line that is written is
    fetched before, which in-place passes need not pay for.
    """

    def __init__(self, device: torch.device, elements: int = ELEMENTS) -> None:
        self._w, self._m, self._v, self._g = torch.ones(4, elements, device=device)
        self.moved = ACCESSES * 4 * elements
        """Bytes of one call."""

    def __call__(self) -> None:
        self._w.add_(self._g)
        self._m.mul_(1.0)
        self._v.mul_(1.0)
