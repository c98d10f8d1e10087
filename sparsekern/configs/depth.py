"""The number of layers of a model, as its configuration says it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from sparsekern.configs.fields import Skeleton
from sparsekern.graph.containers import containers, keep_blocks


def with_depth(kind: type[nn.Module], config: Any, want: Skeleton) -> Any:
    """The configuration with the numbers of layers of a model.

    Args:
        kind: the class of the model.
        config: its configuration, with these or other numbers of layers.
        want: the skeleton of the model.

    Returns:
        A changed copy of ``config`` if lists of modules are shorter, else ``config``. Its counts of layers
        and its lists with an entry for each layer follow as in the removal of blocks
        (:func:`sparsekern.graph.containers.keep_blocks`).

    Raises:
        ValueError: ``config`` makes no model of this class, or it is not known which list a number counts.
    """
    made = Skeleton.made(kind, config)
    kept = {
        path: _kept(blocks, want.module.get_submodule(path))
        for path, blocks in containers(made.module).items()
        if 0 < want.lengths.get(path, 0) < made.lengths[path]
    }
    if not kept:
        return config
    # The model is thrown away, so nothing has to be restored.
    keep_blocks(made.module, kept, ExitStack())
    return made.module.config


def _kept(before: Any, after: Any) -> list[int]:
    """The layers of ``before`` that ``after`` still has, in order: the first ones of the same kinds."""
    marks = [_marks(layer) for layer in before]
    telling = {name for mark in marks for name in mark if len({m.get(name) for m in marks}) > 1}
    left, kept = list(range(len(marks))), []
    for layer in after:
        own = _marks(layer)
        match = next((i for i in left if all(marks[i].get(n) == own.get(n) for n in telling)), None)
        if match is None:
            return list(range(len(after)))
        kept.append(match)
        left = [i for i in left if i > match]
    return kept


def _marks(layer: nn.Module) -> dict[str, Any]:
    """The texts and flags that a layer and the modules in it keep, such as the kind of its attention."""
    return {
        f"{prefix}.{name}": value
        for prefix, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, str)) and not name.startswith("_") and name != "training"
    }
