"""The random generators of torch, NumPy and Python: reading, setting and storing their states."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.files.schema import NOTHING, Accepted, Array, Either, Fields, Items, OneOf, Real, Row, Whole

_TWISTER = 624  # words of the Mersenne twister


def _as_generator(value: Tensor) -> None:
    torch.Generator().set_state(value)


_WORD = Whole(0, 2**32 - 1)
GENERATORS = Fields(
    {
        "torch": Accepted(_as_generator, "state of torch's generator"),
        "cuda": Items(Array(dtype=torch.uint8, ndim=1)),
        "numpy": Fields(
            {
                "bit_generator": OneOf(("MT19937",)),
                "state": Fields(
                    {
                        "key": Array((_TWISTER,), torch.int64, low=0, high=2**32 - 1),
                        "pos": Whole(0, _TWISTER),
                    }
                ),
                "has_gauss": Whole(0, 1),
                "gauss": Real(),
            }
        ),
        "python": Row(
            [OneOf((3,)), Row([*[_WORD] * _TWISTER, Whole(0, _TWISTER)]), Either((NOTHING, Real()))]
        ),
    }
)
"""State of the generators of torch, NumPy and Python in one process."""


def random_state(model: nn.Module) -> dict[str, Any]:
    """The states of the generators of torch, NumPy and Python, as tensors and plain values."""
    arrays = np.random.get_state(legacy=False)
    key = torch.from_numpy(arrays["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _devices(model)],
        "numpy": {**arrays, "state": {**arrays["state"], "key": key}},
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any], model: nn.Module) -> None:
    """Set the generators to a result of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    for own, device in zip(state["cuda"], _devices(model), strict=False):
        torch.cuda.set_rng_state(own, device)
    np.random.set_state(_numpy_state(state["numpy"]))
    random.setstate(_python_state(state["python"]))


def check_cuda(state: Mapping[str, Any], model: nn.Module, name: str) -> None:
    """Check that the generators of the model's GPUs accept their states; ``name`` is that of ``state``.

    Raises:
        ValueError: a generator does not accept its state.
    """
    for own, device in zip(state["cuda"], _devices(model), strict=False):
        try:
            torch.Generator(device).set_state(own)
        except RuntimeError as error:
            raise ValueError(
                f"{name}['cuda']: got a tensor of shape {list(own.shape)}, expected the state of a generator "
                f"of {device}: {error}"
            ) from None


def _numpy_state(value: Mapping[str, Any]) -> dict[str, Any]:
    """The NumPy generator's state in a checkpoint as the argument of ``numpy.random.set_state``."""
    key = value["state"]["key"].cpu().numpy().astype(np.uint32)
    return {**value, "state": {**value["state"], "key": key}}


def _python_state(value: Any) -> tuple[Any, ...]:
    """The Python generator's state in a checkpoint as the argument of ``random.setstate``."""
    version, internal, gauss = value
    return version, tuple(internal), gauss


def _devices(model: nn.Module) -> list[torch.device]:
    # Reading the generator of any other GPU would allocate memory on it.
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
