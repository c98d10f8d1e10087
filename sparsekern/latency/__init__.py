"""Latency of a network for any set of kept channels, from timings on the user's machine."""

from sparsekern.latency.measure import measure as measure
from sparsekern.latency.model import LatencyModel as LatencyModel

__all__ = [
    "LatencyModel",
    "measure",
]


def __dir__() -> list[str]:
    return __all__
