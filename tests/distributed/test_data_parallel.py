"""DistributedDataParallel gives the masks of one process with the same global batch, or an error."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distributed.training import (
    IMAGES,
    STEPS,
    assert_equal_results,
    batch,
    loss_of,
    network,
    start,
    trained,
    trained_each,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsekern
from benchmarks.processes import run
from sparsekern import criteria

CASES: list[tuple[str, dict[str, Any]]] = [
    ("ours AdamW", {}),
    ("ours SGD", {}),
    ("torch RMSprop", {}),
    # The random numbers are the same in all processes.
    ("ours AdamW", {"select": criteria.Random(3)}),
    ("ours AdamW", {"select": criteria.Shuffled(criteria.Taylor(), seed=1)}),
]


def test_two_processes_prune_as_one() -> None:
    alone = trained_each("alone", CASES)
    assert all(0 < sum(each.kept) < 0.8 * len(each.channels) for each in alone)
    for results in run(trained_each, 2, "parallel", CASES):
        for result, expected in zip(results, alone, strict=True):
            assert_equal_results(result, expected)


def test_four_processes_prune_as_one() -> None:
    alone = trained("alone")
    for result in run(trained, 4, "parallel"):
        assert_equal_results(result, alone)


def _accumulated() -> Any:
    """Accumulate every step over two portions, the first without communication."""
    training = start("parallel")
    assert isinstance(training.model, DistributedDataParallel)
    for step in range(STEPS):
        images = batch(step, rank=training.rank, ranks=training.ranks)
        portions = images.chunk(2)
        with training.model.no_sync():
            (loss_of(training.model, portions[0]) / 2).backward()
        (loss_of(training.model, portions[1]) / 2).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
    return training.result()


def test_gradients_accumulate_without_communication() -> None:
    alone = trained("alone")
    for result in run(_accumulated, 2):
        assert_equal_results(result, alone)


def _messages_of_differing(what: str) -> tuple[str, list[bool]]:
    """Train until an error; returns its message and which parameters are as before the step."""
    inner = network()
    model: nn.Module = inner
    rank = dist.get_rank()
    if what != "gradients":
        model = DistributedDataParallel(inner)
    arguments: dict[str, Any] = {"keep": 0.3, "steps": STEPS}
    if what == "arguments" and rank == 1:
        arguments["keep"] = 0.4
    if what == "failure":
        arguments["select"] = _Failing(rank == 1)
    try:
        optimizer = sparsekern.optim.AdamW(model.parameters(), lr=0.01)
        sparsekern.Pruner(model, optimizer, batch(0)[:1], **arguments)
        for step in range(STEPS):
            loss_of(model, batch(step, rank=rank, ranks=dist.get_world_size())).backward()
            optimizer.step()
            optimizer.zero_grad()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}", [bool((p == 0).any()) for p in inner.parameters()]
    return "nothing", []


class _Failing(criteria.Criterion):
    """A criterion that fails in some processes."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def __call__(self, statistics: Any) -> Any:
        return statistics.taylor * float("nan" if self._fails else 1)

    def __repr__(self) -> str:
        return "_Failing()"


def test_other_gradients_are_an_error_on_all_ranks_before_anything_is_masked() -> None:
    for message, zeros in run(_messages_of_differing, 2, "gradients"):
        assert message.startswith(
            "RuntimeError: pruning after step 1: got other values in rank 1 of 2 than in rank 0"
        )
        assert "gradients averaged" in message
        assert not any(zeros[:2])


def test_the_ranks_that_differ_are_named() -> None:
    for message, _ in run(_messages_of_differing, 3, "arguments"):
        assert message.startswith("RuntimeError: the Pruner's arguments")
        assert "got other values in rank 1 of 3 than in rank 0" in message


def test_a_rank_that_fails_to_decide_takes_the_others_with_it() -> None:
    first, second = run(_messages_of_differing, 2, "failure")
    assert "RuntimeError: pruning after step 1: rank 1 failed" in first[0]
    assert "ValueError: select" in second[0]


def _compiled_outside() -> list[str]:
    """``torch.compile`` on either side of DistributedDataParallel finds the same channels."""
    inside = DistributedDataParallel(torch.compile(network(), backend="eager"))
    outside = torch.compile(DistributedDataParallel(network()), backend="eager")
    plain = network()
    fingerprints = []
    for model in (plain, inside, outside):
        optimizer = sparsekern.optim.AdamW(model.parameters(), lr=0.01)
        pruner = sparsekern.Pruner(model, optimizer, batch(0)[:1], keep=0.3, steps=STEPS)
        fingerprints.append(str(list(pruner.widths())))
    return fingerprints


def test_wrappers_are_looked_through() -> None:
    (names,) = run(_compiled_outside, 1)
    assert len(set(names)) == 1


def _unknown_group() -> str:
    try:
        start("alone", process_group="gloo")
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_group_is_given_as_one() -> None:
    assert "process_group: got 'gloo', expected a torch.distributed.ProcessGroup" in _unknown_group()


def _each_its_own() -> list[int]:
    """Processes with a group of one each do not compare."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    training = start("alone", process_group=groups[dist.get_rank()], keep=0.3 + 0.2 * dist.get_rank())
    training.train(range(STEPS))
    return training.result().kept


def test_a_group_of_ones_own_trains_apart() -> None:
    first, second = run(_each_its_own, 2)
    assert sum(first) < sum(second)
    assert IMAGES % 2 == 0
