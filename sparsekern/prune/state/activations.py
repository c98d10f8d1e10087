"""The fused normalisations of a network: they skip masked channels and count gradients for pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.distributed.ranks import Ranks
from sparsekern.graph import ChannelGraph, TensorSlots
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.nn import NormAct2d

_ARRAYS = ("threshold", "activity", "updates")


@dataclass(frozen=True, eq=False)
class _Norm:
    """One normalisation, its slice of the flat arrays, and its channels' numbers (-1: never pruned)."""

    module: NormAct2d
    span: slice
    channels: np.ndarray


class Activations:
    """Flat arrays over the channels of all :class:`~sparsekern.nn.NormAct2d` of a model.

    The modules have views of these arrays. The views stay the same tensors while the network keeps its size,
    so compiled steps and captured graphs see changes of their values.

    Attributes:
        counting: whether gradients are counted.
        decay: decay of the exponential means.
        mask: bool ``[K]``; masked channels.
        threshold, activity: float32 ``[K]``, see :class:`~sparsekern.kernels.counts.ChannelCounts`.
        updates: float32 ``[norms]``, see the same class.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        *,
        counting: bool,
        decay: float,
        norms: Sequence[NormAct2d] | None = None,
    ) -> None:
        """Make arrays without masks and counts for ``norms``, by default all of the model."""
        self.counting, self.decay = counting, decay
        if norms is None:
            norms = [module for module in model.modules() if isinstance(module, NormAct2d)]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        slots = {id(parameters[name]): own for name, own in graph.tensors.items() if name in parameters}
        self._norms: list[_Norm] = []
        start = 0
        for module in norms:
            if (channels := _channels_of(module, slots)) is not None:
                self._norms.append(_Norm(module, slice(start, start + len(channels)), channels))
                start += len(channels)
        device = self._norms[0].module.weight.device if self._norms else None
        self.mask = torch.zeros(start, dtype=torch.bool, device=device)
        self.threshold = torch.full((start,), torch.inf, device=device)
        self.activity = torch.zeros(start, device=device)
        self.updates = torch.zeros(len(self._norms), device=device)

    def __len__(self) -> int:
        return len(self._norms)

    def attach(self) -> None:
        """Give the modules their views: they use masks, and count if ``counting``, from now on."""
        for number, norm in enumerate(self._norms):
            if not isinstance(norm.module, NormAct2d):
                continue  # the user has replaced it by torch's module
            norm.module.mask = self.mask[norm.span]
            if self.counting:
                arrays = (
                    self.threshold[norm.span],
                    self.activity[norm.span],
                    self.updates[number : number + 1],
                )
                norm.module.counts = ChannelCounts(*arrays, decay=self.decay)

    def detach(self) -> None:
        """Remove masks and counts from the modules."""
        for norm in self._norms:
            if isinstance(norm.module, NormAct2d):
                norm.module.mask = norm.module.counts = None

    def set_masked(self, masked: np.ndarray) -> None:
        """Set the masks to ``masked``, bool ``[C]``."""
        if self._norms:
            # The channel -1 takes the last entry, which is never masked.
            self.mask.copy_(torch.from_numpy(np.append(masked, False)[self._channels()]))

    def shares(self, num_channels: int) -> np.ndarray | None:
        """The mean activity over the norms of each channel, without bias, float64 ``[C]``.

        It is NaN for a channel without a norm that has counted. The result is None if nothing is counted.
        """
        if not self.counting:
            return None
        updates = self.updates.double().cpu().numpy()
        unbias = np.divide(1.0, 1 - self.decay**updates, out=np.full(len(updates), np.nan), where=updates > 0)
        sizes = [norm.span.stop - norm.span.start for norm in self._norms]
        values = self.activity.double().cpu().numpy() * np.repeat(unbias, sizes)
        channels = self._channels()
        counted = (channels >= 0) & np.isfinite(values)
        total = np.bincount(channels[counted], weights=values[counted], minlength=num_channels)
        norms = np.bincount(channels[counted], minlength=num_channels)
        return np.divide(total, norms, out=np.full(num_channels, np.nan), where=norms > 0)

    def average(self, ranks: Ranks) -> None:
        """Average the counts of all processes, each on its share of the data. All have to call this."""
        if not self.counting or ranks.size == 1:
            return
        mean = ranks.mean(torch.cat([self.activity, self.updates]).double().cpu().numpy())
        for own, values in zip(
            (self.activity, self.updates), np.split(mean, [len(self.activity)]), strict=True
        ):
            own.copy_(torch.from_numpy(values))

    def forget(self) -> None:
        """Reset the means to 0, and keep the thresholds."""
        self.activity.zero_()
        self.updates.zero_()

    def check_within(self, model: nn.Module) -> None:
        """Check that the normalisations are modules of ``model``.

        Raises:
            ValueError: one was taken out of it.
        """
        lost = {id(norm.module) for norm in self._norms} - set(map(id, model.modules()))
        if lost:
            raise ValueError(
                f"model: got one without {len(lost)} of the fused normalisations that it had, expected the "
                f"modules that the Pruner was made with"
            )

    def restricted(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        kept: np.ndarray,
        copies: Mapping[int, nn.Module] | None = None,
    ) -> Activations:
        """The arrays for only the channels ``kept`` (bool ``[C]``).

        Args:
            model: the smaller model.
            graph: its channels.
            kept: the channels that it keeps.
            copies: the modules of ``model`` by ``id`` of the module before, if ``model`` is another object.
        """
        norms: Any = [(copies or {}).get(id(norm.module), norm.module) for norm in self._norms]
        own = Activations(model, graph, counting=self.counting, decay=self.decay, norms=norms)
        own.load_state_dict(self.restricted_state(kept))
        return own

    def restricted_state(self, kept: np.ndarray) -> dict[str, Tensor]:
        """The state for a network with only the channels ``kept`` (bool ``[C]``)."""
        left = torch.from_numpy(np.append(kept, True)[self._channels()]).to(self.activity.device)
        return {"threshold": self.threshold[left], "activity": self.activity[left], "updates": self.updates}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all arrays except the masks, which follow from the channels' states."""
        return {name: getattr(self, name).clone() for name in _ARRAYS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a result of :meth:`state_dict` into the arrays, in place."""
        for name in _ARRAYS:
            getattr(self, name).copy_(state[name])

    @staticmethod
    def check(state: object, expected: Mapping[str, Tensor]) -> None:
        """Check that ``state`` has the names, shapes and dtypes of ``expected``.

        Raises:
            ValueError: it does not.
        """
        entries: Mapping[str, Any] = state if isinstance(state, Mapping) else {}
        for name, own in expected.items():
            other = entries.get(name)
            if not isinstance(other, Tensor) or other.shape != own.shape or other.dtype != own.dtype:
                found = type(other).__name__ if not isinstance(other, Tensor) else list(other.shape)
                raise ValueError(
                    f"state['activations'][{name!r}]: got {found}, expected {own.dtype} {list(own.shape)}; "
                    f"load it into a model with the same fused normalisations"
                )

    def _channels(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(norm.channels for norm in self._norms)])


def _channels_of(norm: NormAct2d, slots: Mapping[int, TensorSlots]) -> np.ndarray | None:
    """The channels of a norm's features, int64 ``[features]``; None unless masks zero gamma and beta."""
    vectors = [vector for vector in (norm.weight, norm.bias) if vector is not None]
    found: list[np.ndarray] = []
    for vector in vectors:
        own = slots.get(id(vector))
        if own is None or own.row_dim != 0 or own.channels[0] is None:
            return None
        found.append(own.channels[0])
    if not found or not np.array_equal(found[0], found[-1]) or not (found[0] >= 0).any():
        return None
    return found[0]
