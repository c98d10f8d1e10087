"""The lists of a step, kept until something that they were made from is another object."""

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
    """The parameters, gradients and state that lists were made from."""

    def grads(self, groups: Groups, state: dict[Any, Any]) -> list[Tensor] | None:
        """The gradients that there are, in order.

        None when a parameter or state is another object, another parameter has a gradient, or a
        gradient is of another dtype or layout than it was.
        """


@dataclass(eq=False)
class Kept:
    """Lists of a step, and everything they were made from, by identity.

    Attributes:
        lists: what :meth:`grads` vouches for.
        names: of the state that each group's step uses.
        sources: native where possible: after a step that went through more memory than the caches hold,
            Python needs a microsecond for a tensor.
        held: objects that native sources compare with and do not own.
        sharded: whether a parameter is.
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
        """Lists that were just made from the parameters of ``groups`` and ``state``."""
        held: list[Any] = []
        module = _native.load()
        sources: Sources | None = None if module is None else module.sources(groups, state, held)
        sharded = any(is_sharded(param) for group in groups for param in group["params"])
        return cls(lists, names, sources or PythonSources(groups, state), held, sharded)

    def grads(
        self, groups: Groups, names: list[tuple[str, ...]], state: dict[Any, Any]
    ) -> list[Tensor] | None:
        """The gradients that there are, in order; None when lists made now would be other ones."""
        if names != self.names or (self.sharded and self._moved()):
            return None
        return self.sources.grads(groups, state)

    def _moved(self) -> bool:
        """Whether a parameter or state has another local part than the lists."""
        return not all(_same(list(map(local, tensors.owners)), tensors.params) for tensors in self.lists)


class PythonSources:
    """Sources where there are no native ones, or where they cannot read a gradient; no tensor is hashed."""

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
    return itertools.chain.from_iterable(map(dict.values, state_dicts))


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))
