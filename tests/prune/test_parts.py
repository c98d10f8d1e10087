"""The parts of a Pruner keep their state to themselves, and one that cannot be attached leaves no hook."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prune.networks import Plain, batch

import sparsekern
from sparsekern import Pruner, prune
from sparsekern.prune.state.statistics import ChannelRows, trained_by

FILES = sorted(Path(inspect.getfile(prune)).parent.rglob("*.py"))
OF_TORCH = {"_BatchNorm", "_backward_hooks", "_buffers", "_optimizer_step_post_hooks", "_parameters"}


def private(tree: ast.AST, *, own: bool) -> Iterator[str]:
    """Private attributes that the code reads or sets, of ``self`` and ``cls`` or of other objects."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.match("_[^_]", node.attr):
            continue
        if own == (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield node.attr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_part_reads_private_attributes_of_another(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert set(private(tree, own=False)) <= set(private(tree, own=True)) | OF_TORCH


def test_the_pruner_is_composed_and_fits_its_bound() -> None:
    assert Pruner.__bases__ == (object,)
    assert len(inspect.getsource(Pruner).splitlines()) < 300


def test_models_are_unwrapped_once_where_a_user_hands_them_in() -> None:
    callers = {
        path.stem: path.read_text().count(" unwrap(") for path in FILES if " unwrap(" in path.read_text()
    }
    assert callers == {"once": 1, "pruner": 1}


@pytest.mark.parametrize("nonfinite", ["ignore", "raise"])
@pytest.mark.parametrize("kind", [sparsekern.optim.SGD, torch.optim.SGD])
def test_a_pruner_that_cannot_be_attached_leaves_no_hook(
    kind: type[torch.optim.Optimizer], nonfinite: str
) -> None:
    model = Plain(8)
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    graph = sparsekern.trace(model, batch(0))
    table = ChannelRows(model, graph, trained_by(optimizer), decay=0.9).table
    attached = sparsekern.optim.attach(optimizer, table)
    before = [list(h) for h in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)]
    with pytest.raises((RuntimeError, ValueError), match="optimizer|table|rows"):
        Pruner(model, optimizer, batch(0), keep=0.5, steps=20, nonfinite=nonfinite)
    after = [list(h) for h in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)]
    assert after == before
    attached.remove()
    Pruner(model, optimizer, batch(0), keep=0.5, steps=20, nonfinite=nonfinite)
