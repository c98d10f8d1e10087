"""Which channels of a model can be pruned, given the parameters that are trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsekern.distributed.tensors import is_sharded
from sparsekern.graph import ChannelGraph, dry_run, trace
from sparsekern.prune.decide.roles import Equal, lone, resolve_equal, role_name
from sparsekern.prune.decide.sayable import unsayable

_IDLE = (
    "its weights and gates are not trained, so nothing is known of its channels (when the Pruner is "
    "made, the optimizer has to hold them, and they have to require a gradient)"
)


def prunable_graph(
    model: nn.Module,
    trained: set[int],
    example_inputs: Tensor | tuple[Any, ...],
    protect: Sequence[str | nn.Module | nn.Parameter],
    exact: bool = True,
    example_kwargs: Mapping[str, Any] | None = None,
    depth: bool = False,
    equal: Equal = None,
) -> ChannelGraph:
    """The model's graph, without groups that are not trained and groups that a dry run found not removable.

    With ``equal``, a group whose counterpart in another layer cannot change its width stays, too. With
    ``equal="config"`` so does a group whose width the configuration cannot say.

    Args:
        model: the model.
        trained: the result of :func:`sparsekern.prune.state.statistics.trained_by`.
        example_inputs, protect, exact, example_kwargs, depth, equal: as for :class:`sparsekern.Pruner`.

    Raises:
        ValueError: the optimizer lacks trainable parameters, the model does not accept the inputs, or no
            channel is left.

    Warns:
        UserWarning: the configuration cannot say the width of a group.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_held(parameters, trained)
    if depth and any(map(is_sharded, parameters.values())):
        raise ValueError("depth: got True for a model sharded by fully_shard, expected one that is not")
    graph = trace(
        model, example_inputs, example_kwargs=example_kwargs, protect=protect, exact=exact, depth=depth
    )
    trained_blocks = [b for b in graph.blocks if all(id(parameters[name]) in trained for name in b.writers)]
    graph = graph.with_blocks(trained_blocks, _IDLE)
    idle = [
        group.name
        for group in graph.groups
        if not group.of_blocks
        and not any(
            id(parameters[name]) in trained
            for name in (*_gate_names(graph, group.channels), *group.producers)
        )
    ]
    if idle:
        graph = graph.freeze(idle, _IDLE)
        # The trace has tried its groups in a dry run; with some of them frozen the smaller network is another
        # one.
        graph = dry_run(model, graph, example_inputs, example_kwargs=example_kwargs)
    if unsaid := _unsaid(model, graph, equal):
        for name, reason in unsaid.items():
            graph = graph.freeze([name], f"equal='config', and {reason}")
        graph = dry_run(model, graph, example_inputs, example_kwargs=example_kwargs)
    while unequal := lone(equal, model, graph):
        for name, reason in unequal.items():
            graph = graph.freeze([name], reason)
        graph = dry_run(model, graph, example_inputs, example_kwargs=example_kwargs)
    if not graph.num_channels:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in graph.frozen[:3])
        raise ValueError(
            f"model: got a {type(model).__name__} without a channel that can be removed, expected at least "
            f"one ({reasons}); print(sparsekern.trace(model, example_inputs)) shows all reasons"
        )
    return graph


def _unsaid(model: nn.Module, graph: ChannelGraph, equal: Equal) -> dict[str, str]:
    """The groups that stay whole because a configuration cannot say their width, with the reason, by name.

    Only ``equal="config"`` keeps them; the user is told of them with every other ``equal`` but None.
    """
    resolved = resolve_equal(equal, model)
    if resolved is None or not (found := unsayable(model, graph)):
        return {}
    roles = dict.fromkeys(role_name(model, name) for name in found)
    listed = f"{', '.join(list(roles)[:4])}: {next(iter(found.values()))}"
    if resolved == "config":
        warnings.warn(
            f"equal: got 'config', which keeps {len(found)} groups whole, as the configuration cannot say "
            f"their width ({listed}); pass equal='role' to prune them, too, and save with sparsekern.save",
            stacklevel=4,
        )
        return found
    warnings.warn(
        f"equal: got {equal!r} for a {type(model).__name__}, expected 'config' for a result that "
        f"save_pretrained can write, as the configuration cannot say the width of {len(found)} groups "
        f"({listed}); sparsekern.save writes any widths",
        stacklevel=4,
    )
    return {}


def _gate_names(graph: ChannelGraph, channels: np.ndarray) -> set[str]:
    first = int(channels[0])
    span = slice(int(graph.gates.offsets[first]), int(graph.gates.offsets[first + 1]))
    return {graph.gates.names[index] for index in graph.gates.tensors[span]}


def _check_held(parameters: Mapping[str, nn.Parameter], trained: set[int]) -> None:
    missing = [name for name, p in parameters.items() if p.requires_grad and id(p) not in trained]
    if missing:
        raise ValueError(
            f"optimizer: got one without {len(missing)} trainable parameters of the model "
            f"({', '.join(missing[:3])}), expected all that require a gradient; add them to its groups"
        )
