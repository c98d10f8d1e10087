"""A small network that compaction is tested on, and plans for it written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.compact import Plan, TensorPlan
from sparsekern.graph import ChannelGraph

# The channels that are kept of an eight-channel layer.
KEPT = (0, 3, 4, 5, 7)

NORM = ("weight", "bias", "running_mean", "running_var")


class Chain(nn.Module):
    """Convolution, norm, depthwise, transposed convolution and linear, eight channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depth(torch.relu(self.norm(self.stem(x)))))
        return self.head(self.up(x).mean((2, 3)))


def mask(model: nn.Module, graph: ChannelGraph, kept: np.ndarray) -> None:
    """Zeroes every row of the channels that are not ``kept``, bool [C], in place."""
    parameters = dict(model.named_parameters())
    for name, slots in graph.tensors.items():
        channels = None if slots.row_dim is None else slots.channels[slots.row_dim]
        if channels is not None:
            gone = np.flatnonzero((channels >= 0) & ~kept[channels])
            with torch.no_grad():
                parameters[name].index_fill_(slots.row_dim, torch.from_numpy(gone), 0)


def plan_for(model: nn.Module, keep: Mapping[str, Mapping[int, Sequence[int]]]) -> Plan:
    """A plan with the shapes of ``model`` and the indices of ``keep``."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Plan(
        {
            name: TensorPlan(tuple(tensors[name].shape), {d: np.array(i) for d, i in dims.items()})
            for name, dims in keep.items()
        }
    )


def chain_plan(model: Chain, kept: Sequence[int] = KEPT) -> Plan:
    """Removes all but ``kept`` of the eight channels that run from ``stem`` to ``up``."""
    rows = ["stem.weight", *(f"norm.{n}" for n in NORM), "depth.weight", "depth.bias", "act.weight"]
    return plan_for(model, {**{name: {0: kept} for name in rows}, "up.weight": {0: kept}})


def mask_chain(model: Chain, kept: Sequence[int] = KEPT) -> Chain:
    """Zeroes the channels that ``chain_plan`` removes."""
    gone = [c for c in range(8) if c not in kept]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.partition(".")[0] in ("stem", "norm", "depth", "act"):
                parameter[gone] = 0
    return model


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm statistics and affine parameters as after a training, in place."""
    generator = torch.Generator().manual_seed(seed)
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, norms):
                continue
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_floating_point():
                    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    # Away from zero, where the norm would amplify rounding errors.
                    tensor.copy_(noise + 0.5 if name in ("weight", "running_var") else noise - 0.5)
    return model


def chain() -> Chain:
    """A ``Chain`` in float64 with seeded weights and random norm statistics."""
    torch.manual_seed(0)
    model = Chain().to(torch.float64)
    randomise(model)
    return model


def sizes(module: nn.Module) -> dict[str, Any]:
    """The size attributes of torch's layers that this layer has."""
    names = (
        "in_channels out_channels groups in_features out_features num_features num_channels "
        "num_groups num_parameters embedding_dim normalized_shape"
    )
    return {name: getattr(module, name) for name in names.split() if hasattr(module, name)}


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Asserts that the block leaves tensors and sizes of ``module`` as they are."""
    before = {name: (id(t), t.clone()) for name, t in module.state_dict(keep_vars=True).items()}
    attributes = [repr(m) for m in module.modules()]
    yield
    after = module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(id(after[n]) == i and torch.equal(after[n], t) for n, (i, t) in before.items())
    assert [repr(m) for m in module.modules()] == attributes
