"""Networks in the runtimes that people deploy to: torch, torch.compile, ONNX Runtime, OpenVINO."""

from sparsekern.runtimes.names import RUNTIMES as RUNTIMES
from sparsekern.runtimes.names import Runtime as Runtime
from sparsekern.runtimes.names import check_runtime as check_runtime
from sparsekern.runtimes.names import installed as installed
from sparsekern.runtimes.names import require as require
from sparsekern.runtimes.names import version as version

__all__ = ["RUNTIMES", "Runtime", "check_runtime", "installed", "require", "version"]


def __dir__() -> list[str]:
    return __all__
