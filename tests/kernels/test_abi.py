"""Names that Python and the native code share stand in the same order in both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsekern.kernels import backends, native, options
from sparsekern.kernels.backends.lists import row_arrays
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.rows import ROW_ARRAYS

CORE: Any = native.load()
needs_core = pytest.mark.skipif(CORE is None, reason="there is no compiled core")


@needs_core
def test_names_stand_in_the_order_of_the_header() -> None:
    """The Python order follows from the fields of the classes, and the header has its own."""
    assert options.HYPER == CORE.HYPER


@pytest.mark.parametrize("op", [options.SGD, options.ADAM, options.MASK])
def test_every_field_reaches_native_code_under_its_name(op: int) -> None:
    numbers = {name: (i + 1) / 64 for i, name in enumerate(options.FIELDS[op])}
    given = {name: numbers[name] if "float" in kind else True for name, kind in options.FIELDS[op].items()}
    table: Any = SimpleNamespace(tau=101.0, decay=102.0)
    values = options.hyper(op, options.OPTIONS[op](**given), table, 103.0)
    expected = dict.fromkeys(options.HYPER, 0.0) | {name: float(value) for name, value in given.items()}
    expected |= {"tau": 101.0, "decay": 102.0, "grad_scale": 103.0, "scaled": 1.0}
    if op == options.MASK:
        expected["decoupled"] = 1.0
    assert dict(zip(options.HYPER, map(float, values), strict=True)) == expected


def test_statistics_have_a_rate_that_is_not_0() -> None:
    values = options.hyper(options.STATISTICS, options.StatisticsOptions(), None)
    expected = dict.fromkeys(options.HYPER, 0) | {"lr": 1.0, "grad_scale": 1.0, "tau": 1.0}
    assert dict(zip(options.HYPER, values, strict=True)) == expected


def test_a_rate_that_is_a_tensor_is_not_read() -> None:
    lr = torch.ones((), device="meta")
    assert options.hyper(options.MASK, options.MaskOptions(lr), None)[options.HYPER.index("lr")] == 0


@needs_core
def test_a_core_with_another_order_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take one hyperparameter for another."""
    swapped = (CORE.HYPER[1], CORE.HYPER[0], *CORE.HYPER[2:])
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(HYPER=swapped))
    reason = backends.why_not("cpu", "cpu")
    assert reason is not None and reason.startswith(
        "the compiled core is of another version (it takes weight_decay, lr"
    )


@pytest.mark.parametrize("op", range(4))
def test_schemas_have_the_lists_and_the_fields(op: int) -> None:
    schema = getattr(torch.ops.sparsekern, options.NAMES[op]).default._schema
    arguments = {argument.name: argument for argument in schema.arguments}
    assert tuple(name for name, a in arguments.items() if not a.kwarg_only) == options.LISTS[op]
    for name, kind in options.FIELDS[op].items():
        assert str(arguments[name].type) == kind.partition(" ")[0]
        assert (f"tensor_{name}" in arguments) == ("Tensor" in kind)
    for name in options.LISTS[op]:
        alias = arguments[name].alias_info
        assert (alias is not None and alias.is_write) == (op != options.STATISTICS)


@pytest.mark.parametrize("op", [options.SGD, options.ADAM, options.MASK])
def test_options_are_frozen(op: int) -> None:
    made = options.OPTIONS[op](
        **{n: 0.5 if "float" in kind else False for n, kind in options.FIELDS[op].items()}
    )
    with pytest.raises(AttributeError):
        made.lr = 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "fast", None])
@pytest.mark.parametrize("op", [options.SGD, options.ADAM, options.MASK])
def test_every_number_is_checked_by_name(op: int, value: Any) -> None:
    for name, kind in options.FIELDS[op].items():
        if "float" in kind:
            given = {n: 0.5 if "float" in k else False for n, k in options.FIELDS[op].items()} | {name: value}
            with pytest.raises((ValueError, TypeError), match=f"^{name}: got {value!r}.*expected a"):
                options.OPTIONS[op](**given)


@needs_core
def test_the_cuda_library_gets_the_same_numbers() -> None:
    assert tuple(name for name, _ in cuda_library.Hyper._fields_) == CORE.HYPER


def test_triton_gets_the_same_numbers() -> None:
    pytest.importorskip("triton")
    from sparsekern.kernels.backends.triton import table

    assert [table.NUMBERS[i.value] for i in (table.LR, table.BETA2, table.EPS, table.DECAY)] == [
        "lr",
        "beta2",
        "eps",
        "decay",
    ]
    flags = (table.NESTEROV, table.DECOUPLED, table.MAXIMIZE, table.LERP_FROM_START, table.TRACKS)
    names = ["nesterov", "decoupled", "maximize", "lerp_from_start", "tracks"]
    assert [table.OPTIONS[flag.value.bit_length() - 1] for flag in flags] == names


@needs_core
def test_the_arrays_of_a_table_are_handed_over_in_the_order_of_the_header() -> None:
    assert ROW_ARRAYS == CORE.ROW_ARRAYS
    named = SimpleNamespace(**{name: name for name in CORE.ROW_ARRAYS})
    assert row_arrays(named) == CORE.ROW_ARRAYS


@needs_core
def test_the_ops_see_that_native_code_checks_memory() -> None:
    """Without it each step and normalisation checks its arrays in Python as well, which takes longer."""
    assert backends.choose(torch.device("cpu")).CHECKS_MEMORY
