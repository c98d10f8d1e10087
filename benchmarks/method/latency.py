"""Latency of the study's networks, rebuilt from the widths in the lines and timed in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.method.arms import ARMS
from benchmarks.method.runs import MODELS
from benchmarks.method.sets import classes_of
from benchmarks.method.training import graph_of
from benchmarks.method.widths import rebuilt
from sparsekern.recipes.measure import latency
from sparsekern.recipes.settings import Settings, build_model

SIZE = 256  # edge of the timed image in pixels


def measure(records: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Median seconds of a forward pass of every network that a run of `seed` ended with, one image.

    Times do not depend on weights. The networks of one budget take turns, the dense one among them.
    """
    lines = [record for record in records if record["seed"] == seed]
    budgets = {(r["model"], r["keep"]) for r in lines if r["keep"] is not None}
    times = []
    for model, keep in sorted(budgets):
        own = [r for r in lines if r["model"] == model and r["keep"] in (None, keep)]
        networks = {(r["arm"], r["set"]): _network(r) for r in own}
        example = torch.randn(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        named = {f"{arm} {name}": network for (arm, name), network in networks.items()}
        seconds = latency(named, example)
        times += [
            {"model": model, "keep": keep, "arm": arm, "set": name, "latency": seconds[f"{arm} {name}"]}
            for arm, name in networks
        ]
    return times


def _network(record: Mapping[str, Any]) -> nn.Module:
    settings: Settings = replace(MODELS[record["model"]], classes=classes_of(record["set"]))
    if not record["widths"]:
        settings = replace(settings, width=ARMS[record["arm"]].multiplier)
        return build_model(settings).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = rebuilt(build_model(settings), graph_of(settings), record["widths"], seed=0)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
