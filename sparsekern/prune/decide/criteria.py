"""Criteria give every channel a saliency; the least salient channel of a layer is removed first.

Saliencies are float64 arrays ``[C]`` over all channels, at least 0; larger is more important. Criteria
combine with each other and with numbers by ``*`` and ``+``: ``Taylor() * GradientCount()``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sparsekern.prune.state.activations import Activations
from sparsekern.prune.state.partners import Partners
from sparsekern.prune.state.statistics import Statistics, effective_filters

__all__ = [
    "Criterion",
    "GradientCount",
    "Magnitude",
    "Partners",
    "Random",
    "Redundancy",
    "Shuffled",
    "Taylor",
    "default",
]


def __dir__() -> list[str]:
    return __all__


class Criterion(ABC):
    """Computes a saliency for every channel; subclasses define it."""

    @abstractmethod
    def __call__(self, statistics: Statistics) -> np.ndarray:
        """Saliency of every channel, float64 ``[C]``, at least 0."""

    def __mul__(self, other: Criterion | float) -> Criterion:
        return _Combined(self, _criterion(other), np.multiply, "*")

    def __add__(self, other: Criterion | float) -> Criterion:
        return _Combined(self, _criterion(other), np.add, "+")

    __rmul__ = __mul__
    __radd__ = __add__

    @property
    def needs_gradients(self) -> bool:
        """Whether it uses statistics of gradients, besides the weights."""
        return True

    @property
    def needs_activations(self) -> bool:
        """Whether it uses the counts of fused normalisations."""
        return False

    def partners(self, statistics: Statistics, saliency: np.ndarray) -> Partners | None:
        """The replacement of each channel, or None if the criterion does not look for duplicates."""
        return None


@dataclass(frozen=True)
class Taylor(Criterion):
    """Root mean square over steps of (gradient . weight) over the channel's gates.

    The first-order estimate of the loss change when the channel is removed (Molchanov et al. 2019,
    "Importance Estimation for Neural Network Pruning", eq. 8, with the gate's rows as parameters).
    """

    def __call__(self, statistics: Statistics) -> np.ndarray:
        return statistics.taylor


@dataclass(frozen=True)
class GradientCount(Criterion):
    """Share of a channel's gradient elements above a scale-free threshold, over steps.

    Attributes:
        level: ``"weight"`` counts elements of the gradients of the channel's filters. ``"activation"`` counts
            elements of the gradients that reach its activation. The :class:`~sparsekern.nn.NormAct2d` before
            the activation counts them (:func:`sparsekern.fusion.fuse`); a channel without one uses the count
            of its weights.
        relative: divide by the mean of the group's live channels, so that a layer's level of gradient noise
            does not determine its width.

    Raises:
        ValueError: ``level`` is another value.
    """

    level: str = "weight"
    relative: bool = True

    def __post_init__(self) -> None:
        if self.level not in ("weight", "activation"):
            raise ValueError(f"level: got {self.level!r}, expected 'weight' or 'activation'")

    @property
    def needs_activations(self) -> bool:
        return self.level == "activation"

    def __call__(self, statistics: Statistics) -> np.ndarray:
        share = statistics.activity
        if self.level == "activation":
            if statistics.activation_counts is None:
                raise ValueError(
                    "level: got 'activation' for statistics without counts of activations, expected "
                    "'weight'; sparsekern.fusion.fuse(model, example_inputs) makes a model that counts them"
                )
            share = statistics.activation_counts
        if not self.relative:
            return share
        mean = statistics.per_group(lambda live: float(live.mean()), share)
        # If no gradient of a group ever passed a threshold, all its channels are equally salient.
        return np.divide(share, mean, out=np.ones_like(share), where=mean > 0)


@dataclass(frozen=True)
class Magnitude(Criterion):
    """l2 norm of the channel's filters (Li et al. 2017, "Pruning Filters for Efficient ConvNets": l1)."""

    @property
    def needs_gradients(self) -> bool:
        return False

    def __call__(self, statistics: Statistics) -> np.ndarray:
        return statistics.magnitude


@dataclass(frozen=True)
class Random(Criterion):
    """A fixed random order of all channels, as the control for criteria."""

    seed: int = 0

    @property
    def needs_gradients(self) -> bool:
        return False

    def __call__(self, statistics: Statistics) -> np.ndarray:
        return np.random.default_rng(self.seed).random(statistics.total)[statistics.numbers]


@dataclass(frozen=True)
class Shuffled(Criterion):
    """The saliencies of another criterion, permuted at random within each group.

    Layers stay as wide as with ``of``, but their channels are chosen at random. This control measures the
    value of the choice of channels alone.

    Attributes:
        of: the other criterion.
        seed: seed of the permutations.
    """

    of: Criterion
    seed: int = 0

    @property
    def needs_gradients(self) -> bool:
        return self.of.needs_gradients

    @property
    def needs_activations(self) -> bool:
        return self.of.needs_activations

    def __call__(self, statistics: Statistics) -> np.ndarray:
        saliency = self.of(statistics).copy()
        for group in statistics.graph.groups:
            live = group.channels[statistics.live[group.channels]]
            random = np.random.default_rng((self.seed, group.id, len(live)))
            saliency[live] = saliency[random.permutation(live)]
        return saliency


@dataclass(frozen=True)
class Redundancy(Criterion):
    """Lowers the saliency of filters that another filter of their group can replace.

    A channel's saliency is that of ``of`` times ``1 - excess``, where ``excess`` rises from 0 to 1 as the
    cosine to the nearest *more salient* live channel of the group rises from ``threshold`` to 1. Of two
    duplicates only the less salient one loses value; the other keeps its full value. With ``of=None`` all
    channels are equally salient, and the later of two duplicates goes first.

    Attributes:
        of: the criterion whose saliency is multiplied; None for 1 everywhere.
        threshold: cosine above which two filters count as redundant, in [0, 1).
        fold: add the columns of a removed duplicate in its consumers to those of the channel that replaces
            it.

    Raises:
        ValueError: ``threshold`` is out of range.
    """

    of: Criterion | None = None
    threshold: float = 0.9
    fold: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: got {self.threshold!r}, expected a number in [0, 1)")

    @property
    def needs_gradients(self) -> bool:
        return self.of is not None and self.of.needs_gradients

    @property
    def needs_activations(self) -> bool:
        return self.of is not None and self.of.needs_activations

    def _base(self, statistics: Statistics) -> np.ndarray:
        return np.ones(statistics.graph.num_channels) if self.of is None else self.of(statistics)

    def __call__(self, statistics: Statistics) -> np.ndarray:
        base = self._base(statistics)
        cosine = _nearest_more_salient(statistics, base).cosine
        excess = np.clip((cosine - self.threshold) / (1 - self.threshold), 0, 1)
        return base * (1 - excess)

    def partners(self, statistics: Statistics, saliency: np.ndarray) -> Partners | None:
        if not self.fold:
            return None
        found = _nearest_more_salient(statistics, saliency)
        redundant = found.cosine >= self.threshold
        return Partners(np.where(redundant, found.channel, -1), found.cosine, found.coefficient)


@dataclass(frozen=True)
class _Combined(Criterion):
    left: Criterion
    right: Criterion
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
    symbol: str

    @property
    def needs_gradients(self) -> bool:
        return self.left.needs_gradients or self.right.needs_gradients

    @property
    def needs_activations(self) -> bool:
        return self.left.needs_activations or self.right.needs_activations

    def __call__(self, statistics: Statistics) -> np.ndarray:
        return self.combine(self.left(statistics), self.right(statistics))

    def partners(self, statistics: Statistics, saliency: np.ndarray) -> Partners | None:
        found = self.left.partners(statistics, saliency)
        return found if found is not None else self.right.partners(statistics, saliency)

    def __repr__(self) -> str:
        return f"({self.left!r} {self.symbol} {self.right!r})"


@dataclass(frozen=True)
class _Constant(Criterion):
    value: float

    @property
    def needs_gradients(self) -> bool:
        return False

    def __call__(self, statistics: Statistics) -> np.ndarray:
        return np.full(statistics.graph.num_channels, self.value)


def _criterion(value: Criterion | float) -> Criterion:
    if isinstance(value, Criterion):
        return value
    if isinstance(value, (int, float)) and value >= 0:
        return _Constant(float(value))
    raise TypeError(f"criterion: got {value!r} beside * or +, expected a criterion or a number >= 0")


def default() -> Criterion:
    """The default criterion: Taylor times the gradient count, with duplicates removed first."""
    return Redundancy(of=Taylor() * GradientCount())


def check_counted(select: Criterion, activations: Activations) -> None:
    """Raise a ValueError if ``select`` needs counts of activations and no module of the model counts them."""
    if select.needs_activations and not len(activations):
        raise ValueError(
            f"select: got {select!r} for a model without a NormAct2d that has channels to prune, expected "
            f"one; call sparsekern.fusion.fuse(model, example_inputs) first, or use level='weight'"
        )


def saliency(select: Criterion, statistics: Statistics) -> np.ndarray:
    """The saliencies that ``select`` gives, float64 ``[C]``.

    Raises:
        ValueError: the result is not one finite number for every channel.
    """
    found = np.asarray(select(statistics), np.float64)
    if found.shape != (statistics.graph.num_channels,) or not np.isfinite(found).all():
        raise ValueError(
            f"select: got saliencies of shape {list(found.shape)} with {int((~np.isfinite(found)).sum())} "
            f"values that are not finite from {select!r}, expected shape [{statistics.graph.num_channels}] "
            f"and finite values"
        )
    return found


@torch.no_grad()
def _nearest_more_salient(statistics: Statistics, saliency: np.ndarray) -> Partners:
    """For each live channel, the more salient live channel of its group with the largest cosine."""
    size = statistics.graph.num_channels
    found = Partners(np.full(size, -1), np.zeros(size), np.zeros(size))
    for group in statistics.graph.groups:
        live = statistics.live[group.channels]
        channels = group.channels[live]
        if len(channels) < 2 or not group.producers:
            continue
        vectors = effective_filters(group, statistics)[torch.from_numpy(live)]
        # Most salient first; ties in the order of ids, so that the result is deterministic.
        order = np.argsort(-saliency[channels], kind="stable")
        vectors = vectors[torch.from_numpy(order).to(vectors.device)]
        channels = channels[order]
        norms = vectors.norm(dim=1)
        products = vectors @ vectors.T
        # A filter that is not finite gets a cosine of 0.
        cosine = (products / (norms[:, None] * norms[None, :]).clamp_min(1e-30)).nan_to_num(0.0)
        above = torch.ones_like(cosine, dtype=torch.bool).tril(-1)
        best, nearest = torch.where(above, cosine, -1.0).max(dim=1)
        coefficient = products.gather(1, nearest[:, None])[:, 0] / norms[nearest].square().clamp_min(1e-30)
        # No channel is more salient than the first one.
        found.channel[channels[1:]] = channels[nearest.cpu().numpy()][1:]
        found.cosine[channels[1:]] = best.clamp(0, 1).double().cpu().numpy()[1:]
        found.coefficient[channels[1:]] = coefficient.double().cpu().numpy()[1:]
    return found
