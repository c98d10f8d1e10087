"""A small segmentation network and its training, in one process or in several with the same global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import max_pool2d
from torch.nn.parallel import DistributedDataParallel

import sparsekern

STEPS = 12
ARGUMENTS: dict[str, Any] = {"keep": 0.3, "steps": STEPS, "events": 3, "warmup": 0.2, "finish": 0.8}
IMAGES = 8


class Net(nn.Module):
    """A level of a UNet, and a convolution without norm.

    The number of processes divides no width, so parts are uneven; with four processes some are empty. The
    transposed convolution has its rows in dimension 1.
    """

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.stem = _block(3, width)
        self.down = _block(width, 2 * width + 3)
        self.up = nn.ConvTranspose2d(2 * width + 3, width, 2, stride=2)
        self.mid = _block(2 * width, width)
        self.bare = nn.Conv2d(width, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.up(self.down(max_pool2d(fine, 2)))
        x = self.mid(torch.cat([fine, torch.relu(coarse)], 1))
        return self.head(torch.relu(self.bare(x)))

    def train(self, mode: bool = True) -> Net:
        """Train; batch norms use their running statistics, because those of a partial batch differ."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def _block(inputs: int, outputs: int) -> nn.Sequential:
    norm = nn.BatchNorm2d(outputs)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm, nn.ReLU())


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().train()


def batch(step: int, *, rank: int = 0, ranks: int = 1) -> Tensor:
    """Step ``step`` always sees the same images; rank ``rank`` of ``ranks`` its share of them."""
    random = torch.Generator().manual_seed(step)
    return torch.randn(IMAGES, 3, 8, 8, generator=random, dtype=torch.float64)[rank::ranks]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.mean(1, keepdim=True).sin()).square().mean()


@dataclass
class Run:
    """A training: the model as the Pruner got it, the module inside, and what belongs to it."""

    model: nn.Module
    inner: Net
    optimizer: torch.optim.Optimizer
    pruner: sparsekern.Pruner
    rank: int = 0
    ranks: int = 1
    losses: list[float] = field(default_factory=list)

    def train(self, steps: range) -> None:
        for step in steps:
            loss = loss_of(self.model, batch(step, rank=self.rank, ranks=self.ranks))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

    def result(self) -> Result:
        compact = self.pruner.compact()
        return Result(
            kept=[kept for kept, _ in self.pruner.widths().values()],
            fading=self.pruner.metrics()["condemned"],
            channels=self.pruner.state_dict()["channels"],
            params=[whole(param) for param in self.inner.parameters()],
            compact=[param.detach() for param in compact.parameters()],
            kind=f"{type(compact).__module__}.{type(compact).__qualname__}",
            rows={k: v for k, v in self.pruner.state_dict()["rows"].items() if isinstance(v, Tensor)},
        )


@dataclass
class Result:
    """The results that are compared between trainings; tensors are gathered."""

    kept: list[int]
    fading: int
    channels: Tensor
    params: list[Tensor]
    compact: list[Tensor]
    kind: str
    rows: dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def start(how: str, *, optimizer: str = "ours AdamW", mesh: tuple[int, ...] = (), **arguments: Any) -> Run:
    """A training ``how`` it is distributed: ``"alone"``, ``"parallel"`` (DDP) or ``"sharded"`` (FSDP2)."""
    inner = network()
    model: nn.Module = inner
    rank, ranks = (0, 1) if how == "alone" else (dist.get_rank(), dist.get_world_size())
    if how == "parallel":
        model = DistributedDataParallel(inner)
    elif how == "sharded":
        shape = mesh or (ranks,)
        devices = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
        fully_shard(inner.up, mesh=devices)
        fully_shard(inner, mesh=devices)
    origin, name = optimizer.split()
    kind = getattr(sparsekern.optim if origin == "ours" else torch.optim, name)
    options = {"lr": 0.01} | ({"momentum": 0.9} if name == "SGD" else {})
    made = kind(model.parameters(), **options)
    pruner = sparsekern.Pruner(model, made, batch(0)[:1], **ARGUMENTS | arguments)
    return Run(model, inner, made, pruner, rank, ranks)


def trained(
    how: str, optimizer: str = "ours AdamW", arguments: dict[str, Any] | None = None, **more: Any
) -> Result:
    run = start(how, optimizer=optimizer, **more, **(arguments or {}))
    run.train(range(STEPS))
    return run.result()


def trained_each(how: str, cases: Sequence[tuple[str, dict[str, Any]]]) -> list[Result]:
    """A training per case: an optimizer, and arguments of the Pruner."""
    return [trained(how, optimizer, arguments) for optimizer, arguments in cases]


def assert_equal_results(ours: Result, alone: Result) -> None:
    """The same channels are gone, and all numbers agree to rounding."""
    assert ours.kept == alone.kept
    assert ours.fading == alone.fading
    assert torch.equal(ours.channels, alone.channels)
    assert ours.kind == alone.kind
    for mine, theirs in zip(ours.params + ours.compact, alone.params + alone.compact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    for name, values in alone.rows.items():
        # Kept in float32.
        torch.testing.assert_close(ours.rows[name], values, rtol=2e-5, atol=1e-8, msg=name)
