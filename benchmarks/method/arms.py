"""The arms of the study: ways to come to a network of a given cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsekern import Pruner, allocate, criteria
from sparsekern.prune.decide.allocate import Allocator, Global
from sparsekern.prune.decide.criteria import Criterion, GradientCount, Redundancy, Shuffled, Taylor

# Arguments of the Pruner that are the same for all arms.
SCHEDULE = ("warmup", "finish", "events", "penalty", "exact")

Rate = Literal["dense", "narrow", "default", "x0.5"]
Widths = Literal["dense", "uniform", "flat", "default", "multiplier"]


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        about: what it does, for the report.
        select: the criterion of a pruned training by its seed; None where nothing is pruned.
        allocate: the allocator of a pruned training.
        fused: norms compute their activations (`sparsekern.fusion.fuse`).
        widths: of a network that is not pruned. `"uniform"`: every layer is scaled alike, `"flat"`: all
            layers are equally wide, both at the MACs of the budget. `"default"`: what the default of the same
            seed ends with. `"multiplier"`: the network's own factor on its widths.
        multiplier: that factor.
        time_of: another arm; so many steps that the training takes as long as that arm's.
        rate_of: the arm whose own best learning rate this arm trains with, of `sets.RATES`.
        rate_power: the learning rate is multiplied by the share of the MACs that is left to minus this power.
        gain_power: the same in addition, for biases and gains.
        fan_in_power: the learning rate of a weight is multiplied by the share of its inputs that is left to
            minus this power. With 1 it is the rule for Adam in Yang et al. 2022, "Tensor Programs V".
        options: arguments of the Pruner that differ from its defaults.
    """

    about: str
    select: Callable[[int], Criterion] | None = None
    allocate: Allocator = field(default_factory=Global)
    fused: bool = False
    widths: Widths = "dense"
    multiplier: float = 1.0
    time_of: str | None = None
    rate_of: Rate = "default"
    rate_power: float = 0.0
    gain_power: float = 0.0
    fan_in_power: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pruned(self) -> bool:
        return self.select is not None

    @property
    def sized(self) -> bool:
        """Whether the result depends on the budget."""
        return self.pruned or self.widths in ("uniform", "flat", "default") or self.time_of is not None

    def recipe(self) -> str:
        """The settings, beside set, budget and seed, that must be equal for a stored run to count."""
        if self.select is None:
            # The final widths of the default change with the default.
            follows = "default" in (self.widths, self.time_of)
            own = f"widths={self.widths} multiplier={self.multiplier:g} time_of={self.time_of}"
            return f"{own} of {ARMS['default'].recipe()}" if follows else own
        given = inspect.signature(Pruner).parameters
        options = {name: given[name].default for name in SCHEDULE} | dict(self.options)
        schedule = " ".join(f"{name}={value!r}" for name, value in options.items())
        powers = {name: getattr(self, name) for name in ("rate_power", "gain_power", "fan_in_power")}
        rates = "".join(f" {name}={power:g}" for name, power in powers.items() if power)
        return f"select={self.select(0)!r} allocate={self.allocate!r} fused={self.fused} {schedule}{rates}"


def _default(seed: int) -> Criterion:
    return criteria.default()


ARMS: dict[str, Arm] = {
    "dense": Arm("the full network, never pruned", rate_of="dense"),
    "narrow": Arm(
        "all widths scaled alike to the same MACs, from scratch", widths="uniform", rate_of="narrow"
    ),
    "flat": Arm("all layers equally wide at the same MACs, from scratch", widths="flat", rate_of="narrow"),
    "fresh": Arm(
        "the widths that the default ends with, new weights, same steps", widths="default", rate_of="narrow"
    ),
    "default": Arm("sparsekern as it comes", _default),
    "balance": Arm("default with `Global(balance=0.75)`", _default, Global(balance=0.75)),
    "shuffled": Arm(
        "default, but chance deals the saliencies out within each layer",
        lambda seed: Shuffled(criteria.default(), seed),
    ),
    "random": Arm(
        "chance ranks the channels, every layer cut by the same share",
        criteria.Random,
        allocate.Uniform(),
    ),
    "uniform": Arm("default, every layer cut by the same share", _default, allocate.Uniform()),
    "taylor": Arm("Taylor alone", lambda seed: Taylor()),
    "count": Arm("gradient count alone", lambda seed: GradientCount()),
    "magnitude": Arm("filter norm alone", lambda seed: criteria.Magnitude()),
    "redundancy": Arm("redundancy alone", lambda seed: Redundancy()),
    "activation": Arm(
        "default, counting at the activations (`fusion.fuse`)",
        lambda seed: Redundancy(of=Taylor() * GradientCount(level="activation")),
        fused=True,
    ),
    "default-time": Arm("default, as long as the dense network trains", _default, time_of="dense"),
    "narrow-time": Arm(
        "narrow, as long as the default trains", widths="uniform", time_of="default", rate_of="narrow"
    ),
    "narrow-long": Arm(
        "narrow, as long as the dense network trains", widths="uniform", time_of="dense", rate_of="narrow"
    ),
    "dense-time": Arm("dense, as long as the default trains", time_of="default", rate_of="dense"),
    "x0.75": Arm("width multiplier 0.75, from scratch", widths="multiplier", multiplier=0.75, rate_of="x0.5"),
    "x0.5": Arm("width multiplier 0.5, from scratch", widths="multiplier", multiplier=0.5, rate_of="x0.5"),
    "x0.35": Arm("width multiplier 0.35, from scratch", widths="multiplier", multiplier=0.35, rate_of="x0.5"),
}


# The default with one change each, tried on the seeds of `tuning.py` at the learning rates of the default.
VARIANTS: dict[str, Arm] = {
    "finish0.8": Arm("events until 0.8 of the steps", _default, options={"finish": 0.8}),
    "later": Arm("events from 0.2 to 0.8 of the steps", _default, options={"warmup": 0.2, "finish": 0.8}),
    "balance0.5": Arm("`Global(balance=0.5)`", _default, Global(balance=0.5)),
    "fisher": Arm(
        "squared Taylor term, the second-order estimate",
        lambda seed: Redundancy(of=Taylor() * Taylor() * GradientCount()),
    ),
    "rate0.5": Arm("learning rate times `share**-0.5` of the MACs left", _default, rate_power=0.5),
    "gains": Arm("learning rate of biases and gains times `share**-1`", _default, gain_power=1.0),
    "fan_in": Arm(
        "learning rate of a weight times `share**-1` of its inputs left", _default, fan_in_power=1.0
    ),
    "fan_in0.5": Arm(
        "learning rate of a weight times `share**-0.5` of its inputs left", _default, fan_in_power=0.5
    ),
    "rate0.25": Arm("learning rate times `share**-0.25` of the MACs left", _default, rate_power=0.25),
    "events20": Arm("20 events", _default, options={"events": 20}),
    "penalty0": Arm("no extra decay of gates before an event", _default, options={"penalty": 0.0}),
    "finish0.45 rate0.5": Arm(
        "events until 0.45 of the steps, and rates as in rate0.5",
        _default,
        rate_power=0.5,
        options={"finish": 0.45},
    ),
    "finish0.3 rate0.5": Arm(
        "events until 0.3 of the steps, and rates as in rate0.5",
        _default,
        rate_power=0.5,
        options={"finish": 0.3},
    ),
    "plain": Arm("Taylor times gradient count, redundancy left out", lambda seed: Taylor() * GradientCount()),
    "finish0.45": Arm("events until 0.45 of the steps", _default, options={"finish": 0.45}),
}


def arm_of(name: str) -> Arm:
    """The arm or variant of that name."""
    return ARMS[name] if name in ARMS else VARIANTS[name]
