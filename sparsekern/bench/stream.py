"""The memory bandwidth to compare with: torch passes with 4 reads and 3 writes in place, as in AdamW."""

from __future__ import annotations

import torch

# Elements of each of 4 float32 arrays: 68 MB, larger than caches. The number is not a power of two, as arrays
# at multiples of 4 KiB conflict in a cache and lose a fifth of the bandwidth.
ELEMENTS = 17_000_000
# Number of reads and writes of each element, 4 bytes each.
ACCESSES = 7


class Stream:
    """Passes over four arrays much larger than caches: ``w += g``, ``m *= c``, ``v *= c``.

    Together they read and write as much as AdamW. A copy would show half of the bandwidth, because each cache
    line is fetched before it is written; passes in place have read the line already.
    """

    def __init__(self, device: torch.device, elements: int = ELEMENTS) -> None:
        self._w, self._m, self._v, self._g = (torch.ones(elements, device=device) for _ in range(4))

    def __call__(self) -> None:
        self._w.add_(self._g)
        self._m.mul_(1.0)
        self._v.mul_(1.0)
