"""The comparison of a backend's normalisations with the reference as an assertion."""

from __future__ import annotations

from types import ModuleType

import torch

from sparsekern.kernels.selfcheck.norms import NormProblem, norm_difference


def assert_equals_reference(backend: ModuleType, given: NormProblem) -> None:
    """Both passes of `backend` equal the reference, given the same mean and variance."""
    text = norm_difference(backend, given, torch.device("cpu"))
    assert text is None, text
