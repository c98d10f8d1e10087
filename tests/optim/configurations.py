"""The configurations that torch tests SGD, Adam and AdamW with.

They come from torch's own table where it can be imported (it is private and needs an extra package), else
from a copy of the one in torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

try:
    from torch.testing._internal.common_optimizers import optim_db
except ImportError:
    optim_db = []
# The import forbids the whole process to set flags such as torch.backends.*.enabled.
torch.backends.__allow_nonbracketed_mutation_flag = True

NAMES = ("SGD", "Adam", "AdamW")


@dataclass(frozen=True)
class Inputs:
    name: str
    options: dict[str, Any]
    error: type[BaseException] | None = None
    message: str = ""
    params: Any = None

    def __str__(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}-{self.message or options or 'default'}"


_SGD: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 1e-2},
    {"lr": torch.tensor(0.001)},
    {"weight_decay": 0.5},
    {"momentum": 0.9},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
)
_ADAM: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True},
)
_MIXED = "betas must be either both floats or both Tensors"
_FOREACH = "as a Tensor is not supported for capturable=False and foreach=True"
_ERRORS: dict[str, tuple[tuple[dict[str, Any], str], ...]] = {
    "SGD": (({"momentum": -0.5}, "Invalid momentum value: -0.5"),),
    "Adam": (
        ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"lr": torch.tensor(0.001), "foreach": True}, f"lr {_FOREACH}"),
        ({"betas": (0.9, torch.tensor(0.99))}, _MIXED),
        ({"betas": (torch.tensor(0.9), 0.99)}, _MIXED),
        (
            {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
            rf"betas\[0\] {_FOREACH}",
        ),
    ),
}


def inputs(dtype: torch.dtype) -> list[Inputs]:
    """Every configuration for parameters of one type."""
    if optim_db:
        return [
            Inputs(info.name, case.kwargs)
            for info in optim_db
            if info.name in NAMES
            for case in info.optim_inputs_func("cpu", dtype)
        ]
    # An eps of 1e-8 rounds to 0 in 16 bits.
    eps = {"eps": 0.1} if dtype is torch.float16 else {}
    adam = [Inputs(name, case | eps) for name in ("Adam", "AdamW") for case in _ADAM]
    return [Inputs("SGD", case) for case in _SGD] + adam


def errors() -> list[Inputs]:
    """Configurations that must be refused, with the expected error."""
    if optim_db:
        found = [
            (info.name, error)
            for info in optim_db
            if info.name in NAMES
            for error in info.optim_error_inputs_func("cpu", torch.float32)
        ]
        return [
            Inputs(name, e.optimizer_error_input.kwargs, e.error_type, e.error_regex, p)
            for name, e in found
            for p in [e.optimizer_error_input.params]
        ]
    return [
        Inputs(name, options, ValueError, message)
        for name in NAMES
        for options, message in _ERRORS["SGD" if name == "SGD" else "Adam"]
    ]
