"""Device and precision of a training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsekern.recipes.errors import InputError

# Precisions of `torch.autocast` by their names on the command line.
AMP: Mapping[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device with this name.

    Raises:
        InputError: torch does not know the device, or the machine does not have it.
    """
    try:
        device = torch.device(name)
        # An allocation is the test: the driver may exist without a device, or the device without this index.
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
    """The autocast context for forward passes; it does nothing for `amp="none"`."""
    dtype = AMP[amp]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def grad_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """A scaler that keeps float16 gradients from underflow; it is disabled for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")
