"""Pruning in a Hugging Face ``Trainer``, and folders that transformers opens without this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sparsekern.compact.reshard import Shard
from sparsekern.distributed.fully_sharded import stand_for
from sparsekern.distributed.tensors import unwrap
from sparsekern.integrations.pretrained import layer_widths, save_pretrained
from sparsekern.integrations.trainers import HeldWeights, Pruning, check_both, from_text, progress, to_text
from sparsekern.optim import unwrap_optimizer
from sparsekern.prune import Pruner

_KEY = "sparsekern.pruner"

__all__ = ["PruningCallback", "layer_widths", "save_pretrained"]


def __dir__() -> list[str]:
    return __all__


class PruningCallback(Pruning, TrainerCallback):
    """Prunes the model of a ``transformers.Trainer`` while it trains; every checkpoint can be resumed from.

    Works with the Trainer's own optimizers and with one of :mod:`sparsekern.optim` in
    ``Trainer(optimizers=(optimizer, None))``, with gradient accumulation and mixed precision. Curves
    ``pruning/{macs_share,params_share,condemned,channels}`` are added to the logs. One callback serves one
    ``train``. To resume, give a new Trainer a new model and callback created with the same arguments. The
    Pruner's state is stored in ``trainer_state.json``, the only file of a checkpoint that callbacks can write
    to. ``config`` keeps the full sizes: :func:`save_pretrained` finds those of :meth:`compact`.

    Args:
        example_inputs: see :class:`sparsekern.Pruner`.
        steps: optimizer steps of the training; default ``max_steps`` of the Trainer's state.
        shard: for a model that FSDP2 shards (``fsdp_version: 2``): shards a model as the Trainer has done it.
            A smaller one takes its place after every event, see :meth:`sparsekern.Pruner.reshard`; the
            Trainer's own object stays and becomes the smaller model.
        options: ``keep`` and other arguments of :class:`sparsekern.Pruner`.

    Raises:
        ValueError: in ``Trainer(...)``, ``load_best_model_at_end`` is set; in ``train()``, the checkpoint is
            of a run without this callback or comes with ``shard``, or an argument of the Pruner is not
            valid.
        RuntimeError: in ``train()``, the callback has served another one.
    """

    def __init__(
        self,
        example_inputs: Tensor | tuple[Any, ...],
        *,
        steps: int | None = None,
        shard: Shard | None = None,
        **options: Any,
    ) -> None:
        self._inputs, self._steps, self._shard, self._options = example_inputs, steps, shard, options
        self._held: HeldWeights | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold back the weights of a checkpoint, which may be smaller than the model."""
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end: got True, expected False: the best model may still have channels "
                "that are pruned at the end"
            )
        self._held = HeldWeights(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the Pruner; a checkpoint's optimizer state is loaded already, its weights are held back."""
        if self.pruner is not None or self._held is None:
            raise RuntimeError(
                "callback: got one that has pruned already or was added after the Trainer was made, expected "
                "a new one in Trainer(callbacks=...) for each train()"
            )
        weights, saved = self._held.take(), state.stateful_callbacks.get(_KEY)
        check_both(weights, saved, "resume_from_checkpoint")
        if self._shard is not None and saved is not None:
            raise ValueError(
                "resume_from_checkpoint: got one for a callback with shard=, expected none: the Trainer "
                "loads the weights before the model has their sizes; resume in a loop of your own"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        optimizer = unwrap_optimizer(optimizer).optimizer  # accelerate wraps it
        restored = optimizer.state_dict()
        optimizer.state.clear()
        inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(args.device), self._inputs)
        steps = state.max_steps if self._steps is None else self._steps
        self.pruner = Pruner(model, optimizer, inputs, steps=steps, **self._options)
        if saved is not None:
            self.pruner.load_state_dict(from_text(saved))
            model.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(restored)

    def _reshard(self, pruner: Pruner, shard: Shard, model: nn.Module) -> None:
        """Let the Trainer's model become a smaller one, if channels were masked since the last call."""
        smaller, _ = pruner.reshard(shard)
        smaller = unwrap(smaller)
        if vars(smaller) is not vars(model):
            stand_for(model, smaller)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reshard the model after an event; put the Pruner's state into the Trainer's state before a save."""
        if self._shard is not None and self.pruner is not None:
            self._reshard(self.pruner, self._shard, kwargs["model"])
        if control.should_save and self.pruner is not None:
            state.stateful_callbacks[_KEY] = to_text(self.pruner.state_dict())

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the curves to the entry that is being logged."""
        if self.pruner is not None:
            for entry in (kwargs["logs"], state.log_history[-1]):
                entry.update(progress(self.pruner))
