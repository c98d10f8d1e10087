"""What ``dir`` and ``import *`` of a public module show is what it offers, and nothing that it imports."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

MODULES = [
    "sparsekern",
    "sparsekern.compact",
    "sparsekern.deploy",
    "sparsekern.fusion",
    "sparsekern.graph",
    "sparsekern.integrations.lightning",
    "sparsekern.integrations.transformers",
    "sparsekern.latency",
    "sparsekern.nn",
    "sparsekern.optim",
    "sparsekern.prune",
    "sparsekern.prune.decide.allocate",
    "sparsekern.prune.decide.criteria",
]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", MODULES)
def test_shows_its_own_public_names_alone(name: str) -> None:
    import sparsekern.recipes._torchvision  # noqa: F401  # has to come before what imports torchvision

    # A package may have a function of the same name as its parent's attribute.
    module = importlib.import_module(name)
    assert isinstance(module, ModuleType)
    shown = dir(module)
    assert shown == sorted(set(shown)) == sorted(module.__all__)
    for attribute in shown:
        value = getattr(module, attribute)
        assert attribute == "__version__" or not attribute.startswith("_")
        where = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "sparsekern")
        assert where.startswith("sparsekern"), f"{attribute} is of {where}"


@pytest.mark.parametrize("name", ["criteria", "allocate"])
def test_everything_that_a_user_can_pass_is_shown(name: str) -> None:
    """Classes of the module without an underscore, other than helpers that no argument takes."""
    module = importlib.import_module(f"sparsekern.prune.decide.{name}")
    base = module.Criterion if name == "criteria" else module.Allocator
    own = {
        key
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and not key.startswith("_")
    }
    assert own <= set(dir(module))


def test_the_package_shows_every_name_of_the_readme() -> None:
    import sparsekern

    names = "Pruner prune_once trace verify save load deploy export save_folder from_hub push_to_hub"
    for name in [*names.split(), "criteria", "optim", "nn"]:
        assert name in dir(sparsekern)
