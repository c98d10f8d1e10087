"""Cache of a step's lists, valid while all objects that they were built from stay the same objects."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsekern.distributed.tensors import is_sharded, local
from sparsekern.kernels import native as _native
from sparsekern.optim.lists import TensorList

_grad, _dtype, _layout = attrgetter("grad"), attrgetter("dtype"), attrgetter("layout")

Groups = list[dict[str, Any]]


class Sources(Protocol):
    """The parameters, gradients and state that lists were built from."""

    def grads(self, groups: Groups, state: dict[Any, Any]) -> list[Tensor] | None:
        """All gradients that exist, in the order of their parameters.

        Args:
            groups: ``param_groups`` of the optimizer.
            state: ``state`` of the optimizer.

        Returns:
            The gradients. None when a parameter or state is a different object, a different set of
            parameters has gradients, or a gradient has a different dtype or layout.
        """


@dataclass(eq=False)
class Kept:
    """Lists of a step, and the identities of all objects that they were built from.

    Attributes:
        lists: the cached lists, valid while :meth:`grads` does not return None.
        names: state names that each group's step uses.
        sources: the compared objects. Native where possible: after a step that touches more memory than the
            CPU caches hold, Python needs about 1 microsecond per tensor.
        held: references to the objects that native sources compare with and do not own.
        sharded: whether a parameter is a DTensor.
    """

    lists: list[TensorList]
    names: list[tuple[str, ...]]
    sources: Sources
    held: list[Any]
    sharded: bool

    @classmethod
    def of(
        cls, lists: list[TensorList], groups: Groups, names: list[tuple[str, ...]], state: dict[Any, Any]
    ) -> Kept:
        """Cache ``lists``, which were just built from the parameters of ``groups`` and from ``state``."""
        held: list[Any] = []
        module = _native.load()
        sources: Sources | None = None if module is None else module.sources(groups, state, held)
        sharded = any(is_sharded(param) for group in groups for param in group["params"])
        return cls(lists, names, sources or PythonSources(groups, state), held, sharded)

    def grads(
        self, groups: Groups, names: list[tuple[str, ...]], state: dict[Any, Any]
    ) -> list[Tensor] | None:
        """All gradients that exist, in order; None when the cached lists are no longer valid."""
        if names != self.names or (self.sharded and self._moved()):
            return None
        return self.sources.grads(groups, state)

    def _moved(self) -> bool:
        """Whether a parameter's local part differs from the tensor in the lists."""
        return not all(_same(list(map(local, tensors.owners)), tensors.params) for tensors in self.lists)


class PythonSources:
    """Fallback for when the native core is missing or cannot read a gradient; no tensor is hashed."""

    def __init__(self, groups: Groups, state: dict[Any, Any]) -> None:
        self._params = [list(group["params"]) for group in groups]
        every = list(map(_grad, itertools.chain.from_iterable(self._params)))
        self._present = [grad is not None for grad in every]
        self._dtypes = [grad.dtype for grad in every if grad is not None]
        self._states = list(state.values())
        self._dicts = [value for value in self._states if isinstance(value, dict)]
        self._values = list(_values(self._dicts))

    def grads(self, groups: Groups, state: dict[Any, Any]) -> list[Tensor] | None:
        """See :meth:`Sources.grads`."""
        params = [group["params"] for group in groups]
        if len(params) != len(self._params) or not all(map(_same, params, self._params)):
            return None
        every = list(map(_grad, itertools.chain.from_iterable(params)))
        grads = [grad for grad in every if grad is not None]
        same = (
            [grad is not None for grad in every] == self._present
            and _same(list(map(_dtype, grads)), self._dtypes)
            and {torch.strided}.issuperset(map(_layout, grads))
            and _same(list(state.values()), self._states)
            and _same(list(_values(self._dicts)), self._values)
        )
        return grads if same else None


def _values(state_dicts: list[dict[str, Any]]) -> Iterable[Any]:
    """All values of the state dicts, in order."""
    return itertools.chain.from_iterable(map(dict.values, state_dicts))


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """Whether both sequences hold the same objects in the same order."""
    return len(these) == len(those) and all(map(is_, these, those))
