"""Groups whose widths a configuration has no field for, so that no stock folder can hold the result."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import nn

from sparsekern.compact import compact
from sparsekern.compact.plan import make_plan
from sparsekern.configs import Skeleton, class_of, has_config, opened, refusal
from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.roles import Roles


def unsayable(model: nn.Module, graph: ChannelGraph) -> dict[str, str]:
    """The groups whose width the configuration of a model cannot say, with the reason, by name.

    Every role is made narrower alone, in a model on the meta device, and a configuration is looked for.

    Args:
        model: the network at full size.
        graph: its groups.

    Returns:
        Empty for a model without a configuration. Groups of blocks are left out: a configuration counts them.
    """
    if not has_config(model):
        return {}
    kind, whole, roles = class_of(model), Skeleton.of(model), Roles.of("role", model, graph)
    config = _opened(kind, model, whole)
    found: dict[str, str] = {}
    for number in np.unique(roles.numbers):
        groups = [graph.groups[n] for n in np.flatnonzero(roles.numbers == number)]
        width = len(groups[0].channels)
        if groups[0].of_blocks or width < 2:
            continue
        steps = roles.steps.get(int(number), np.arange(1, width))
        smaller = steps[steps < width].tolist()
        reason: str | None = None
        # One width may be refused for its divisors alone.
        for left in dict.fromkeys((*smaller[len(smaller) // 2 :][:1], *smaller[-1:])):
            kept = graph.all_channels()
            for group in groups:
                kept[group.channels[left:]] = False
            plan = make_plan(graph, kept)
            reason = refusal(kind, config, whole, partial(compact, plan=plan))
            if reason is None:
                break
        if reason is not None:
            found |= {group.name: reason for group in groups}
    return found


def _opened(kind: type[nn.Module], model: Any, whole: Skeleton) -> Any:
    """The configuration of a model, with the fields for widths that it has left open."""
    try:
        return opened(kind, model.config, whole)
    except ValueError:
        return model.config
