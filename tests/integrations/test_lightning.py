"""The callback in a real Lightning Trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.networks import CLASSES, Network, assert_same, images
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import sparsekern
import sparsekern.recipes._torchvision  # has to come before lightning, which imports torchvision

# isort: split

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from sparsekern.integrations.lightning import PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*")
EPOCHS, BATCHES = 4, 6


class Module(pl.LightningModule):
    """Classifies; ``optimizer`` makes the optimizer from parameters and a rate."""

    def __init__(self, optimizer: Any = sparsekern.optim.AdamW) -> None:
        super().__init__()
        self.net = Network()
        self.make = optimizer
        self.example_input_array = images(2)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*images(4 * BATCHES)), batch_size=4)


def fit(
    folder: Path,
    callback: PruningCallback | None,
    *,
    module: Module | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[Module, pl.Trainer]:
    torch.manual_seed(0)
    module = module or Module()
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving] if callback is None else [callback, saving],
        **{"max_epochs": EPOCHS} | options,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, trainer


SHRINK = {"shrink": True, "round_to": 1}


@pytest.mark.parametrize("shrink", [{}, SHRINK], ids=["whole", "shrunk"])
@pytest.mark.parametrize("optimizer", [sparsekern.optim.AdamW, torch.optim.RMSprop], ids=["fused", "hooks"])
def test_a_resumed_run_ends_as_the_undisturbed_one(
    tmp_path: Path, optimizer: Any, shrink: dict[str, Any]
) -> None:
    def fresh() -> Module:
        torch.manual_seed(0)
        return Module(optimizer)

    whole = PruningCallback(keep=0.3, events=3, **shrink)
    module, trainer = fit(tmp_path / "whole", whole, module=fresh())
    assert whole.pruner is not None and whole.pruner.finished
    assert (module.net.head.in_features < 32) == bool(shrink)
    for epoch in (0, 2):
        callback = PruningCallback(keep=0.3, events=3, **shrink)
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed, again = fit(tmp_path / f"{epoch}", callback, module=fresh(), ckpt_path=path)
        assert_same(module.state_dict(), resumed.state_dict())
        assert_same(trainer.optimizers[0].state_dict(), again.optimizers[0].state_dict())
        assert callback.pruner is not None
        assert_same(whole.pruner.state_dict(), callback.pruner.state_dict())


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}, {"precision": "64-true"}],
    ids=str,
)
def test_accumulation_and_precisions(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = PruningCallback(keep=0.4, events=1, module="net")
    module, trainer = fit(tmp_path, callback, **options)
    assert callback.pruner is not None
    metrics = callback.pruner.metrics()
    # The last batches of an epoch are stepped even if they are fewer.
    assert (
        metrics["step"]
        == trainer.global_step
        == EPOCHS * (2 if "accumulate_grad_batches" in options else BATCHES)
    )
    assert metrics["finished"] and metrics["macs_share"] <= 0.4
    example = images(2)[0].to(next(module.parameters()).dtype)
    assert sparsekern.verify(module.net, callback.compact(), example) < 1e-5


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_a_sharded_submodule_becomes_smaller(tmp_path: Path, mesh: DeviceMesh) -> None:
    class Sharded(Module):
        def configure_model(self) -> None:
            if not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=mesh)

    def callback() -> PruningCallback:
        sharding = {"module": "net", "shard": lambda model: fully_shard(model, mesh=mesh)}
        return PruningCallback(keep=0.3, events=3, **sharding)

    def fresh() -> Sharded:
        torch.manual_seed(0)
        return Sharded()

    masked, _ = fit(tmp_path / "masked", PruningCallback(keep=0.3, events=3, module="net"), module=fresh())
    own = callback()
    module, _ = fit(tmp_path / "whole", own, module=fresh())
    assert own.pruner is not None and own.pruner.finished
    assert isinstance(module.net, FSDPModule) and module.net.head.in_features < 32
    example, small = images(2)[0], own.compact()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(example), masked.eval()(example), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small.eval()(example), module(example), rtol=1e-5, atol=1e-6)
    held = callback()
    held.load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match="ckpt_path: got a checkpoint for a callback with shard="):
        fit(tmp_path / "again", held, module=fresh())
    with pytest.raises(ValueError, match="shard: got a function without module="):
        PruningCallback(keep=0.3, shard=lambda model: None)


def test_the_curves_are_logged(tmp_path: Path) -> None:
    callback = PruningCallback(keep=0.4, events=1)
    _, trainer = fit(tmp_path, callback)
    logged = trainer.callback_metrics
    assert callback.pruner is not None
    metrics = callback.pruner.metrics()
    assert float(logged["pruning/macs_share"]) == pytest.approx(metrics["macs_share"])
    assert int(logged["pruning/channels"]) == metrics["kept"] < metrics["channels"]
    assert {"pruning/params_share", "pruning/condemned"} <= logged.keys()


def test_the_optimizer_that_holds_the_module_is_watched(tmp_path: Path) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(CLASSES, CLASSES)
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            loss = nn.functional.cross_entropy(self.other(self(batch[0])), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.other.parameters(), 1e-2), sparsekern.optim.SGD(
                self.net.parameters(), 1e-2
            )

    callback = PruningCallback(images(2)[0], keep=0.4, events=2, module="net")
    fit(tmp_path, callback, module=Two())
    assert callback.pruner is not None
    assert callback.pruner.finished and callback.pruner.metrics()["step"] == EPOCHS * BATCHES


def test_a_callback_serves_one_fit(tmp_path: Path) -> None:
    callback = PruningCallback(keep=0.4, events=1)
    with pytest.raises(RuntimeError, match="pruner: got none yet"):
        callback.compact()
    fit(tmp_path, callback, max_epochs=1)
    with pytest.raises(RuntimeError, match="callback: got one that has pruned already"):
        fit(tmp_path, callback)


def test_an_endless_training_needs_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: got inf as the trainer's estimate, expected a number"):
        fit(tmp_path, PruningCallback(keep=0.4), max_epochs=-1)


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, None, max_epochs=1)
    module = Module()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="ckpt_path: got a checkpoint of a run without PruningCallback"):
        fit(tmp_path, PruningCallback(keep=0.4), module=module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(module.state_dict(), before)


def test_a_checkpoint_of_a_shrunk_module_is_evaluated_in_a_fresh_one(tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            self.log("error", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    trained, trainer = fit(tmp_path, PruningCallback(keep=0.3, events=3, **SHRINK), module=Tested())
    fresh, callback = Tested(), PruningCallback(keep=0.3, events=3, **SHRINK)
    again = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    path = tmp_path / f"epoch={EPOCHS - 1}.ckpt"
    expected = trainer.test(trained, loader(), verbose=False)
    assert again.test(fresh, loader(), ckpt_path=path, verbose=False) == expected
    assert_same(fresh.state_dict(), trained.state_dict())
    assert fresh.net.head.in_features < 32 and callback.pruner is None
