"""Shrinking under ``fully_shard``, over gloo on this machine: ``python -m benchmarks.reshard``.

UNet-2M and a small Llama train in 2 and 4 processes, once with masks alone and once with ``pruner.reshard``
after every event. It measures the largest difference of the losses from the first event on, compares the
optimizer's state with what is gathered from the masked model and cut, and compares the most memory of the
call with the share that a process holds. A third and a fourth training go on from a checkpoint from before
and from after the first cut. It takes no times. It writes benchmarks/results/reshard.{txt,json}.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern
from benchmarks.environment import environment
from benchmarks.processes import run
from benchmarks.saved import save
from sparsekern.distributed.tensors import local
from sparsekern.recipes.models import UNet

STEPS, WARMUP, EVENTS, FINISH = 62, 0.05, 2, 0.25  # at least 50 steps follow the first cut
RESUMED = 12  # steps from a checkpoint
PATIENCE = 3000.0  # time limit of the processes in seconds
VOCABULARY, LENGTH = 1024, 16


class Peak(TorchDispatchMode):
    """Adds up the memory of all tensors after every op of torch.

    torch's profiler does not see that a thread of gloo frees a tensor, which is often the last to hold it.

    Attributes:
        above: the most bytes above those at the start of the block.
        where: the op after which this was so.
    """

    def __enter__(self) -> Peak:
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        # `type`, because some objects answer for the class of another.
        for found in gc.get_objects():
            if issubclass(type(found), Tensor):
                self._note(found)
        self._start, self.above, self.where = self._sum(), 0, ""
        return super().__enter__()  # type: ignore[no-any-return]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        if (above := self._sum() - self._start) > self.above:
            self.above, self.where = above, str(func)
        return result

    def _note(self, tensor: Tensor) -> None:
        own = local(tensor)
        if type(own) in (Tensor, nn.Parameter) and own.device.type == "cpu":
            storage = own.untyped_storage()
            self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _sum(self) -> int:
        self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
        return sum(size for _, size in self._held.values())


def unet() -> nn.Module:
    """UNet-2M in float64; its batch norms use running statistics, as those of a partial batch differ."""
    torch.manual_seed(0)
    return UNet(3, 1, width=16).double()


def llama() -> nn.Module:
    """A Llama of four layers with grouped queries and a tied embedding, of 1.8 million weights in float64.

    transformers computes its norms and softmaxes in float32, so rounding is that of float32.
    """
    import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers

    # isort: split
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).double()


def images(step: int) -> Tensor:
    random = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 16, 16, generator=random, dtype=torch.float64)


def tokens(step: int) -> Tensor:
    """Sums of two tokens before, so that there is something to learn."""
    random = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (4, LENGTH), generator=random)
    return start.cumsum(1) % VOCABULARY


def loss_of_images(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x.mean(1, keepdim=True).sin()).square().mean()
    return loss


def loss_of_tokens(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(input_ids=x).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], Callable[..., Tensor], str]] = {
    "UNet-2M": (unet, images, loss_of_images, "macs"),
    "Llama": (llama, tokens, loss_of_tokens, "params"),
}


def shard(model: nn.Module) -> None:
    """Shard blocks and then the rest, as the documentation of ``fully_shard`` does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in ("LlamaDecoderLayer", "ConvTranspose2d"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


@dataclass
class Training:
    """One training in one process."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: sparsekern.Pruner

    @classmethod
    def of(cls, name: str) -> Training:
        make, data, _, of = NETWORKS[name]
        model = make()
        shard(model)
        optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
        kwargs = {"example_kwargs": {"input_ids": data(0)[:1]}} if name == "Llama" else {}
        pruner = sparsekern.Pruner(
            model,
            optimizer,
            () if kwargs else data(0)[:1],
            keep=0.4,
            of=of,  # type: ignore[arg-type]
            steps=STEPS,
            warmup=WARMUP,
            finish=FINISH,
            events=EVENTS,
            **kwargs,
        )
        return cls(name, model, optimizer, pruner)

    def step(self, number: int) -> float:
        _, data, loss_of, _ = NETWORKS[self.name]
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        loss = loss_of(self.model, data(number)[dist.get_rank() :: dist.get_world_size()])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def masked(self) -> bool:
        """Whether channels are masked that the live model still has."""
        state = self.pruner.state_dict()["channels"]
        return bool((state == 2).any())

    def cut(self, state: dict[str, Any] | None = None) -> None:
        self.model, self.optimizer = self.pruner.reshard(shard, state)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state of each parameter, gathered."""
        return {
            f"{name}/{key}": value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
            for name, param in self.model.named_parameters()
            for key, value in self.optimizer.state[param].items()
        }


def masked_losses(name: str) -> list[float]:
    """The losses of a training that only masks."""
    training = Training.of(name)
    return [training.step(number) for number in range(STEPS)]


def resharded(name: str, folder: str) -> dict[str, Any]:
    """The losses of a training that cuts after every event, and what its first cut did."""
    training, losses = Training.of(name), []
    while not training.masked():
        losses.append(training.step(len(losses)))
    save_checkpoint(training, Path(folder) / "before")
    found = described(training)
    gathered = found.pop("state")
    gc.collect()
    with Peak() as peak:
        training.cut()
    now = training.state()
    found |= {
        "peak": peak.above,
        "state tensors": len(gathered),
        "state tensors that differ": sum(not torch.equal(gathered[key], now[key]) for key in gathered),
        "step": len(losses),
    }
    save_checkpoint(training, Path(folder) / "after")
    while len(losses) < STEPS:
        losses.append(training.step(len(losses)))
        training.cut()
    weights = sum(param.numel() for param in training.model.parameters())
    return found | {"losses": losses, "left": weights, "finished": training.pruner.finished}


def described(training: Training) -> dict[str, Any]:
    """Sizes before the cut, and the optimizer's state, gathered and cut by hand."""
    plan, state = training.pruner.plan(), training.state()
    for label, value in state.items():
        part = plan.tensors.get(label.partition("/")[0])
        for dim, indices in part.keep.items() if part is not None and value.dim() else ():
            state[label] = value = value.index_select(dim, torch.from_numpy(indices.copy()))
    params = list(training.model.parameters())
    parts: list[Any] = [param.to_local() for param in params]  # type: ignore[operator]
    return {
        "state": state,
        "weights": sum(param.numel() for param in params),
        # Weights and two moments; gradients are freed after each step.
        "share": 3 * sum(part.nbytes for part in parts),
        "largest": max(param.numel() * param.element_size() for param in params),
    }


def save_checkpoint(training: Training, folder: Path) -> None:
    """Weights and optimizer state by torch, and the Pruner's state, which is the same in all processes."""
    state = training.pruner.state_dict()
    if dist.get_rank() == 0:
        folder.mkdir()
        torch.save(state, folder / "pruner.pt")
    dist.barrier()
    weights, moments = get_state_dict(training.model, training.optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def resumed(name: str, folder: str, kind: str, step: int) -> list[float]:
    """The losses of a training that goes on from a checkpoint."""
    training, path = Training.of(name), Path(folder) / kind
    training.cut(torch.load(path / "pruner.pt", weights_only=True))
    weights, moments = get_state_dict(training.model, training.optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(training.model, training.optimizer, model_state_dict=weights, optim_state_dict=moments)
    losses = []
    for number in range(step, step + RESUMED):
        training.cut()
        losses.append(training.step(number))
    return losses


def difference(ours: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True))


def everything(name: str, folder: str) -> dict[str, Any]:
    """All trainings of one network, in one process of the group."""
    expected = masked_losses(name)
    found = resharded(name, folder)
    step = found["step"]
    differences = {
        kind: difference(resumed(name, folder, kind, step), expected[step : step + RESUMED])
        for kind in ("before", "after")
    }
    return found | {"difference": difference(found["losses"], expected), "resumed": differences}


def measure(name: str, ranks: int) -> dict[str, Any]:
    """All figures of one network in so many processes; of several processes the worst one counts."""
    with tempfile.TemporaryDirectory() as folder:
        results = run(everything, ranks, name, folder, timeout=PATIENCE)
    worst = max(results, key=lambda result: result["peak"] / result["largest"])
    return {
        "network": name,
        "processes": ranks,
        "weights": worst["weights"],
        "weights left": worst["left"],
        "first cut after step": worst["step"],
        "steps after it": STEPS - worst["step"],
        "largest difference of a loss": max(result["difference"] for result in results),
        "from a checkpoint before": max(result["resumed"]["before"] for result in results),
        "from a checkpoint after": max(result["resumed"]["after"] for result in results),
        "state tensors": worst["state tensors"],
        "state tensors that differ": max(result["state tensors that differ"] for result in results),
        "bytes: share of a process": worst["share"],
        "bytes: largest tensor": worst["largest"],
        "bytes: peak above the share": worst["peak"],
    }


def main() -> None:
    """Print the table after every network, and write the result files."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for ranks in (2, 4):
        for name in NETWORKS:
            rows.append(measure(name, ranks))
            console = Console(width=110, record=True)
            table = Table("", *(f"{row['network']}, {row['processes']} processes" for row in rows))
            for label in rows[0]:
                if label not in ("network", "processes"):
                    cells = (row[label] for row in rows)
                    table.add_row(label, *(f"{c:.1e}" if isinstance(c, float) else f"{c:,}" for c in cells))
            console.print(table)
            figures = {"environment": environment(), "rows": rows}
            console.print(figures["environment"])
            save("reshard", console, figures)


if __name__ == "__main__":
    main()
