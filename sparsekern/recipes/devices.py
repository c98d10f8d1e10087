"""Where a training computes, and in which precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsekern.recipes.errors import InputError

# Precisions of `torch.autocast` by their names on the command line.
AMP: Mapping[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: torch knows no such device, or has none of it here.
    """
    try:
        device = torch.device(name)
        # Memory is asked for: a driver may be there without a device, and a device without its number.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu"]
        if torch.cuda.is_available():
            here += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            here.append("mps")
        raise InputError(
            f"--device: got {name!r}, expected one that works here: {', '.join(here)}"
        ) from error
    if device.type == "meta":
        raise InputError("--device: got 'meta', expected one that computes")
    return device


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision for forward passes; does nothing for `amp="none"`."""
    dtype = AMP[amp]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def grad_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Keeps gradients of float16 from underflow; passes everything on for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")
