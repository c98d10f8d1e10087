"""The self-check at the first use of a backend on a device."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from sparsekern.kernels.selfcheck import cases
from sparsekern.kernels.selfcheck.run import has_to_wait, is_usable, results
from sparsekern.kernels.selfcheck.stored import Outcome, Store, device_name

_CASES = {"triton": cases.first_use_of_triton}


class Verdict(NamedTuple):
    """Whether a backend may be used.

    Attributes:
        refusal: why it may not; None if it may.
        is_final: whether that stays so in this process. A check that has to wait runs at a later call.
    """

    refusal: str | None = None
    is_final: bool = True


# Backends that were used before their check, by name and device.
_unchecked: set[tuple[str, torch.device]] = set()


def is_wanted() -> bool:
    """Whether backends are checked.

    Raises:
        ValueError: ``SPARSEKERN_SELFCHECK`` is neither 0 nor 1.
    """
    value = os.environ.get("SPARSEKERN_SELFCHECK", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"SPARSEKERN_SELFCHECK: got {value!r}, expected 0 (do not check) or 1")
    return value != "0"


def verdict(name: str, backend: Any, device: torch.device) -> Verdict:
    """Whether ``backend`` may be used on ``device``, by its stored self-check, else by a new one.

    Args:
        name: name of the backend.
        backend: its module.
        device: device of the tensors.

    Raises:
        RuntimeError: the check left the device unusable.
        ValueError: ``SPARSEKERN_SELFCHECK`` has another value than 0 or 1.
    """
    if not is_wanted():
        return Verdict()
    store = Store(name, device)
    outcome = store.read()
    if outcome is None:
        if has_to_wait(device):
            _unchecked.add((name, device))
            return Verdict(is_final=False)
        outcome = check(name, backend, device)
        store.write(outcome)
        if outcome.failure is not None and not is_usable(device):
            raise RuntimeError(_unusable(name, device, outcome.failure))
    if outcome.failure is None:
        return Verdict()
    return Verdict(_refusal(name, device, outcome.failure))


def check(name: str, backend: Any, device: torch.device) -> Outcome:
    """Run the short list up to the first failed case."""
    made = _CASES.get(name, cases.first_use)()
    failures = (result.failure for result in results(backend, device, made))
    return Outcome(next((failure for failure in failures if failure is not None), None))


def describe(name: str, device: torch.device) -> str:
    """The stored result of a self-check as a text; nothing is run."""
    if not is_wanted():
        return "off (SPARSEKERN_SELFCHECK=0)"
    outcome = Store(name, device).read()
    if outcome is None:
        return "not run yet; it runs at the first use"
    return "passed" if outcome.failure is None else f"failed, not used: {outcome.failure}"


def _refusal(name: str, device: torch.device, failure: str) -> str:
    text = (
        f"its self-check on {device_name(device)} failed: {failure}; please report this with the file that "
        f"`sparsekern selftest --backend {name} --device {device}` writes"
    )
    if (name, device) in _unchecked:
        text += "; CUDA graphs that were captured before the check use it: capture them again"
    return text


def _unusable(name: str, device: torch.device, failure: str) -> str:
    return (
        f"{device}: got a device that stopped working in the self-check of the {name} backend ({failure}), "
        f"expected a working one; start the process again: it remembers the result and uses another backend"
    )
