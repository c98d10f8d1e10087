"""What kept channels cost in time, from timings on the user's own machine."""

from sparsekern.latency.measure import measure as measure
from sparsekern.latency.model import LatencyModel as LatencyModel

__all__ = [
    "LatencyModel",
    "measure",
]


def __dir__() -> list[str]:
    return __all__
