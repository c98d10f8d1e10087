"""The lists of a step, kept until something that they were made from is another object."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from sparsekern._sharding import is_sharded, local
from sparsekern.optim._lists import TensorList

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


@dataclass(eq=False)
class Kept:
    """Lists of a step, and everything they were made from, by identity.

    Validating them costs a third of making them: no hash of a tensor is taken, and all loops over
    tensors run in C.
    """

    lists: list[TensorList]
    params: list[Tensor]
    present: list[bool]
    source: list[Any]
    states: list[Any]
    state_dicts: list[dict[str, Any]]
    values: list[Any]
    dtypes: set[torch.dtype]
    sharded: bool

    @classmethod
    def of(
        cls,
        lists: list[TensorList],
        params: list[Tensor],
        present: list[bool],
        source: list[Any],
        state: dict[Any, Any],
    ) -> Kept:
        states = list(state.values())
        state_dicts = [value for value in states if isinstance(value, dict)]
        values = list(_values(state_dicts))
        dtypes = {tensors.params[0].dtype for tensors in lists}
        sharded = any(map(is_sharded, params))
        return cls(lists, params, present, source, states, state_dicts, values, dtypes, sharded)

    def holds(
        self,
        params: list[Tensor],
        present: list[bool],
        source: list[Any],
        grads: list[Tensor],
        state: dict[Any, Any],
    ) -> bool:
        """Whether lists made now would be the same ones."""
        return (
            present == self.present
            and source == self.source
            and _same(params, self.params)
            and _same(list(state.values()), self.states)
            and _same(list(_values(self.state_dicts)), self.values)
            # Of a single list the operation itself compares the dtypes, before it changes anything.
            and (len(self.lists) == 1 or self.dtypes == set(map(_dtype, grads)))
            and {torch.strided}.issuperset(map(_layout, grads))
            and not (self.sharded and self._moved())
        )

    def _moved(self) -> bool:
        """Whether a parameter or state has another local part than the lists."""
        return not all(_same(list(map(local, tensors.owners)), tensors.params) for tensors in self.lists)


def _values(state_dicts: list[dict[str, Any]]) -> Iterable[Any]:
    return itertools.chain.from_iterable(map(dict.values, state_dicts))


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))
