"""Running the cases of the self-check, in an environment that the caller's settings do not reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _python_dispatch as dispatch

from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.selfcheck.cases import Case


@dataclass(frozen=True)
class Result:
    """What a case showed.

    Attributes:
        case: the case.
        difference: the first difference from the reference; None without one.
        error: type and text of the exception that the backend raised; None without one.
    """

    case: Case
    difference: str | None = None
    error: str | None = None

    @property
    def failure(self) -> str | None:
        """Name of the case and what is wrong; None if the backend passed."""
        what = self.difference or self.error
        return None if what is None else f"{self.case.name}: {what}"

    def plain(self) -> dict[str, Any]:
        """The result as plain data for JSON."""
        case = self.case
        found: dict[str, Any] = {
            "op": case.op,
            "dtype": str(case.dtype).removeprefix("torch."),
            "layout": case.layout,
        }
        found |= {"detail": case.detail, "ok": self.failure is None}
        found |= {} if self.difference is None else {"difference": self.difference}
        return found | ({} if self.error is None else {"error": self.error})


def results(backend: Any, device: torch.device, cases: Iterable[Case]) -> Iterator[Result]:
    """Run cases one by one.

    Args:
        backend: the examined backend.
        device: device of the tensors that it gets.
        cases: the cases.
    """
    for case in cases:
        with undisturbed(device):
            result = _result(backend, device, case)
        yield result


def _result(backend: Any, device: torch.device, case: Case) -> Result:
    try:
        return Result(case, difference=case.examine(backend, device))
    except Exception as error:  # a backend may fail in any way
        return Result(case, error=f"{type(error).__name__}: {error}")


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """A block in which autograd, autocast, inference mode and the default device are not in force."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
        torch._C.DisableTorchFunction(),
    ):
        yield


def has_to_wait(device: torch.device) -> bool:
    """Whether nothing can be run now: during tracing, under a dispatch mode, or in a CUDA graph's capture."""
    if torch.compiler.is_compiling() or dispatch._get_current_dispatch_mode() is not None:
        return True
    return device.type == "cuda" and cuda_library.capturing()


def is_usable(device: torch.device) -> bool:
    """Whether a device still computes. After an illegal access, a GPU refuses all work of the process."""
    try:
        with undisturbed(device):
            return bool(torch.ones(1, device=device).add_(1).item() == 2)
    except RuntimeError:
        return False
