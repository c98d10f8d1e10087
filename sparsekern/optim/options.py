"""The options of a step from the parameter groups of an optimizer, made once per group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.options import FIELDS, OPTIONS, Options, with_rate
from sparsekern.optim.lists import rate

Source = str | tuple[str, int] | None
"""Where an option stands in a parameter group, see :class:`GroupOptions`."""


class GroupOptions:
    """Makes the options of a step from a parameter group, and keeps them until a value of the group changes.

    An option is the entry of the group that has its name. The kept options are those of the group's values as
    objects: a new object means new options. Values that may change in place (tensors other than the rate,
    lists) are read at every step. A rate that is a tensor is part of the options as that tensor.
    """

    def __init__(self, kind: type[Any], renamed: Mapping[str, Source]) -> None:
        """Prepare for one class of options.

        Args:
            kind: the class of the options.
            renamed: where an option stands that has another name in a group: its key, or its key and the
                position in a pair; None for an option that is no entry of a group.
        """
        self._kind = kind
        self._sources: list[tuple[str, str, int | None, bool]] = []
        for name, type_ in FIELDS[OPTIONS.index(kind)].items():
            source = renamed.get(name, name)
            if source is not None:
                key, position = (source, None) if isinstance(source, str) else source
                self._sources.append((name, key, position, type_ == "bool"))
        keys = dict.fromkeys(key for name, key, _, _ in self._sources if name != "lr")
        self._values: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*keys)
        self._kept: dict[int, tuple[tuple[Any, ...], Any]] = {}

    def of(self, index: int, group: dict[str, Any], device: torch.device) -> Options:
        """The options of a step over tensors of a group.

        Args:
            index: index of the group in ``param_groups``.
            group: the group.
            device: device of the tensors.

        Raises:
            TypeError, ValueError: a value is out of range; the message names the option.
        """
        if torch.compiler.is_compiling():
            return self.make(group, device)
        values, lr = self._values(group), group["lr"]
        kept = self._kept.get(index)
        if kept is not None and all(map(is_, kept[0], values)):
            options: Options = kept[1]
            if options.lr is lr and (not isinstance(lr, Tensor) or lr.device == device):
                return options
            options = with_rate(kept[1], lr if type(lr) is float else rate(lr, device))
            self._kept[index] = values, options
            return options
        options = self.make(group, device)
        if all(map(_stays, values)):
            self._kept[index] = values, options
        return options

    def make(self, group: dict[str, Any], device: torch.device, **others: bool) -> Options:
        """New options of a group.

        Args:
            group: the group.
            device: device of the tensors; a rate that is a tensor is copied there.
            others: options that the group does not have.

        Raises:
            TypeError, ValueError: as :meth:`of`.
        """
        values: dict[str, Any] = {}
        for name, key, position, is_flag in self._sources:
            value = group[key] if position is None else group[key][position]
            if name == "lr":
                values[name] = rate(value, device)
            else:
                values[name] = bool(value) if is_flag else float(value)
        made: Options = self._kind(**values, **others)
        return made


def _stays(value: Any) -> bool:
    """Whether an object can have no other value later: a number, or a tuple of numbers."""
    return isinstance(value, (float, int)) or (isinstance(value, tuple) and all(map(_stays, value)))
