"""The number of layers of a model, as its configuration says it."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsekern.configs.fields import Skeleton, changed, fields_of, value_of


def with_depth(kind: type[nn.Module], config: Any, want: Skeleton) -> Any:
    """The configuration with the numbers of layers of a model.

    Args:
        kind: the class of the model.
        config: its configuration, with these or other numbers of layers.
        want: the skeleton of the model.

    Returns:
        A copy of ``config`` if lists of modules have other lengths, else ``config``. A field counts a list
        if the list is shorter by one where the field is. Lists in the configuration with an entry for each
        layer keep the entries of the layers that are left.

    Raises:
        ValueError: ``config`` makes no model of this class.
    """
    made = Skeleton.made(kind, config)
    wrong = {name: n for name, n in made.lengths.items() if want.lengths.get(name, n) != n}
    for field in fields_of(config, int) if wrong else ():
        layers = value_of(config, field)
        if layers not in wrong.values() or layers < 2:
            continue
        shorter = _shortened(config, field, layers, list(range(layers - 1)))
        try:
            counted = Skeleton.made(kind, shorter).lengths
        except ValueError:
            continue
        lists = [n for n in wrong if wrong[n] == layers and counted.get(n) == layers - 1]
        if lists and len({want.lengths[name] for name in lists}) == 1:
            kept = _kept(made.module.get_submodule(lists[0]), want.module.get_submodule(lists[0]))
            config = _shortened(config, field, layers, kept)
    return config


def _shortened(config: Any, field: str, layers: int, kept: list[int]) -> Any:
    """The configuration with the layers ``kept``, of ``layers``."""
    owner = field.rpartition(".")[0]
    values: dict[str, Any] = {field: len(kept)}
    for name in fields_of(config, list):
        entries = value_of(config, name)
        if name.rpartition(".")[0] == owner and len(entries) == layers:
            values[name] = [entries[index] for index in kept]
    return changed(config, values)


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
