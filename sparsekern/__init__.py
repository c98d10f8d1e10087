"""Channel pruning while training, fused into the optimizer step."""

from sparsekern import fusion as fusion
from sparsekern import latency as latency
from sparsekern import nn as nn
from sparsekern import optim as optim
from sparsekern._load import load as load
from sparsekern.compact import compact as compact
from sparsekern.compact import save as save
from sparsekern.compact import verify as verify
from sparsekern.deploy import deploy as deploy
from sparsekern.deploy import export as export
from sparsekern.graph import trace as trace
from sparsekern.hub import from_hub as from_hub
from sparsekern.hub import push_to_hub as push_to_hub
from sparsekern.hub import save_folder as save_folder
from sparsekern.prune import Pruner as Pruner
from sparsekern.prune import prune_once as prune_once
from sparsekern.prune import recalibrate as recalibrate
from sparsekern.prune.decide import allocate as allocate
from sparsekern.prune.decide import criteria as criteria

__version__ = "0.1.0"

__all__ = [
    "Pruner",
    "__version__",
    "allocate",
    "compact",
    "criteria",
    "deploy",
    "export",
    "from_hub",
    "fusion",
    "latency",
    "load",
    "nn",
    "optim",
    "prune_once",
    "push_to_hub",
    "recalibrate",
    "save",
    "save_folder",
    "trace",
    "verify",
]


def __dir__() -> list[str]:
    return __all__
