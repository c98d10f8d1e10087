"""Carrying out a pruning plan: cut the network, verify the result, save and load it."""

from sparsekern.compact.block_plans import ListPlan as ListPlan
from sparsekern.compact.plan import Plan as Plan
from sparsekern.compact.plan import TensorPlan as TensorPlan
from sparsekern.compact.plan import make_plan as make_plan
from sparsekern.compact.shrink import check_copies as check_copies
from sparsekern.compact.shrink import check_cuttable as check_cuttable
from sparsekern.compact.shrink import shrink as shrink
from sparsekern.compact.store import load as load
from sparsekern.compact.store import save as save
from sparsekern.compact.surgery import compact as compact
from sparsekern.compact.surgery import plan_of as plan_of
from sparsekern.compact.verify import verify as verify

__all__ = [
    "ListPlan",
    "Plan",
    "TensorPlan",
    "check_copies",
    "check_cuttable",
    "compact",
    "load",
    "make_plan",
    "plan_of",
    "save",
    "shrink",
    "verify",
]


def __dir__() -> list[str]:
    return __all__
