"""Float64 all the way through networks that compute parts of their forward pass in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def without_float32() -> None:
    """Let casts from float64 to float32 return their operand, in this process."""

    def patched(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        always = plain is Tensor.float

        def cast(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            narrows = always or any(given is torch.float32 for given in (*args, *kwargs.values()))
            return self if narrows and self.dtype == torch.float64 else plain(self, *args, **kwargs)

        return cast

    def wide(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.dtype == torch.float64 and kwargs.get("dtype") == torch.float32:
                kwargs.pop("dtype")
            return plain(x, *args, **kwargs)

        return function

    for owner, names in ((Tensor, ("to", "float", "type")), (nn.functional, ("softmax", "log_softmax"))):
        for name in names:
            plain = getattr(owner, name)
            setattr(owner, name, patched(plain) if owner is Tensor else wide(plain))
