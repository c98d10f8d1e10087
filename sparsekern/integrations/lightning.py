"""Pruning in a Lightning ``Trainer``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsekern.compact import Plan, plan_of, shrink
from sparsekern.compact.reshard import Shard
from sparsekern.integrations.trainers import HeldWeights, Pruning, check_both, optimizer_of, progress
from sparsekern.prune import Pruner
from sparsekern.recipes._torchvision import blaming, warn_of_mismatch  # must be imported before lightning

# isort: split

warn_of_mismatch()
with blaming():
    try:
        import lightning.pytorch as pl
    except ImportError:
        import pytorch_lightning as pl  # type: ignore[no-redef]

__all__ = ["PruningCallback"]


def __dir__() -> list[str]:
    return __all__


class PruningCallback(Pruning, pl.Callback):
    """Prunes a ``LightningModule`` while ``Trainer.fit`` trains it; every checkpoint can be resumed from.

    Automatic and manual optimization, ``accumulate_grad_batches`` and all precisions are supported. Curves
    ``pruning/{macs_share,params_share,condemned,channels}`` are logged with ``self.log``. One callback serves
    one ``fit``. To resume, call ``fit(..., ckpt_path=...)`` with a new module and callback that were created
    with the same arguments.

    Args:
        example_inputs: see :class:`sparsekern.Pruner`; default the module's ``example_input_array``.
        module: name of the submodule to prune, whose ``forward`` takes ``example_inputs``; default the whole
            module.
        steps: optimizer steps of the training; default ``trainer.estimated_stepping_batches``.
        shard: for a submodule that ``fully_shard`` sharded: a smaller one takes its place after every event,
            see :meth:`sparsekern.Pruner.reshard`. Needs ``module``, as the trainer keeps the whole module.
        options: ``keep`` and other arguments of :class:`sparsekern.Pruner`.

    Raises:
        ValueError: ``shard`` comes without ``module``; in ``fit``, the number of steps is not known, the
            checkpoint is of a run without this callback or comes with ``shard``, or an argument of the Pruner
            is not valid.
        RuntimeError: in ``fit``, the callback has served another one.
    """

    def __init__(
        self,
        example_inputs: Tensor | tuple[Any, ...] | None = None,
        *,
        module: str = "",
        steps: int | None = None,
        shard: Shard | None = None,
        **options: Any,
    ) -> None:
        if shard is not None and not module:
            raise ValueError(
                "shard: got a function without module=, expected the name of a sharded submodule: the "
                "trainer keeps the whole module, which cannot be replaced by a smaller one"
            )
        self._shard = shard
        self._inputs, self._module, self._steps, self._options = example_inputs, module, steps, options
        self._held: HeldWeights | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hold back the weights of a checkpoint, which may be smaller than the module."""
        if stage == "fit" and self.pruner is not None:
            raise RuntimeError(
                "callback: got one that has pruned already, expected a new one for each Trainer.fit()"
            )
        self._held = HeldWeights(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the Pruner: the optimizers exist, and their states are not restored yet."""
        weights = self._take()
        check_both(weights, self._restored, "ckpt_path")
        if self._shard is not None and self._restored is not None:
            raise ValueError(
                "ckpt_path: got a checkpoint for a callback with shard=, expected none: Lightning loads the "
                "weights before the submodule has their sizes; resume in a loop of your own"
            )
        self._whole = pl_module
        module = pl_module.get_submodule(self._module)
        inputs = pl_module.example_input_array if self._inputs is None else self._inputs
        inputs = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(inputs))
        steps = trainer.estimated_stepping_batches if self._steps is None else self._steps
        if not 1 <= steps < float("inf"):
            raise ValueError(
                f"steps: got {steps} as the trainer's estimate, expected a number >= 1; pass steps= to the "
                f"callback"
            )
        optimizer = optimizer_of(module, trainer.optimizers)
        self.pruner = Pruner(module, optimizer, inputs, steps=int(steps), **self._options)
        if weights is not None and self._restored is not None:
            self.pruner.load_state_dict(self._restored["pruner"])
            pl_module.load_state_dict(weights, strict=pl_module.strict_loading)

    def _reshard(self, pruner: Pruner, shard: Shard) -> None:
        """Put a smaller submodule in place of the present one, if channels were masked since then."""
        smaller, _ = pruner.reshard(shard)
        parent, _, name = self._module.rpartition(".")
        setattr(self._whole.get_submodule(parent), name, smaller)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Reshard a submodule after an event, and log the curves."""
        if self.pruner is not None:
            if self._shard is not None:
                self._reshard(self.pruner, self._shard)
            pl_module.log_dict(progress(self.pruner))

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut the module to the sizes in the checkpoint, as there is no Pruner without a training."""
        if (weights := self._take()) is not None:
            if self._restored is not None:
                removed = Plan.from_json(self._restored["removed"])
                shrink(pl_module, removed.after(plan_of(pl_module)))
            pl_module.load_state_dict(weights, strict=pl_module.strict_loading)

    on_validation_start = on_test_start = on_predict_start = _evaluate

    def _take(self) -> dict[str, Tensor] | None:
        held, self._held = self._held, None
        return None if held is None else held.take()

    def state_dict(self) -> dict[str, Any]:
        """The state of the Pruner and the plan of all cuts of the module, for every checkpoint."""
        if self.pruner is None:
            return {}
        return {"pruner": self.pruner.state_dict(), "removed": plan_of(self._whole).to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the module is cut to the sizes in it."""
        self._restored = state_dict
