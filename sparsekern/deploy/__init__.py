"""From a compact network to one that runs elsewhere: folded norms, memory format, ONNX and OpenVINO files."""

from sparsekern.deploy.files import export as export
from sparsekern.deploy.network import deploy as deploy

__all__ = [
    "deploy",
    "export",
]


def __dir__() -> list[str]:
    return __all__
