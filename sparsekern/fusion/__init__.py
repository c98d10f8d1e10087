"""Finding a normalisation with its activation in a traced model, and replacing the pair by one module."""

from sparsekern.fusion.replace import Fusion as Fusion
from sparsekern.fusion.replace import fuse as fuse
from sparsekern.fusion.replace import unfuse as unfuse
