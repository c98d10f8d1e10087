"""Whether a configuration can say the sizes of a smaller model, found out on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sparsekern.configs.fields import Skeleton
from sparsekern.configs.fit import Unsayable, fitted, reals


def refusal(
    kind: type[nn.Module], config: Any, whole: Skeleton, cut: Callable[[nn.Module], nn.Module]
) -> str | None:
    """The reason for which no configuration makes a model that is cut in some way.

    Args:
        kind: the class of the model.
        config: its configuration.
        whole: the skeleton of the model before the cut.
        cut: makes the smaller model from one on the meta device, which it may change.

    Returns:
        The reason; None if there is a configuration, or if ``config`` does not make a model like ``whole``.
    """
    try:
        made = Skeleton.made(kind, config)
    except ValueError:
        return None
    if made.differing(whole):
        return None
    small = cut(made.module)
    try:
        says = Skeleton.made(kind, fitted(kind, config, small)).module
    except Unsayable as error:
        return f"a smaller width has {error.text.removeprefix('got ')}"
    except ValueError as error:
        return str(error)
    ours, theirs = reals(small), reals(says)
    for name in ours:
        if name in theirs and theirs[name] != ours[name]:
            return (
                f"{name} stays {ours[name]:g}, and {type(config).__name__} makes {theirs[name]:g} of the "
                f"smaller width"
            )
    return None
