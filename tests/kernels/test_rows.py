"""The table of rows: layout, gates, state, copies, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from sparsekern.kernels.rows import LIVE, RowTable


def _table(**options: Any) -> RowTable:
    params = [
        (Parameter(torch.randn(4, 3)), 0),
        (Parameter(torch.randn(2, 5, 3)), 1),
        (Parameter(torch.randn(4)), 0),
    ]
    return RowTable(params, [np.array([0, 9]), np.array([], dtype=int), np.array([2])], **options)


def test_rows_are_numbered_through() -> None:
    table = _table()
    assert [(view.start, view.rows, view.dim) for view in table.views] == [
        (0, 4, 0),
        (4, 5, 1),
        (9, 4, 0),
    ]
    stranger = Parameter(torch.zeros(2))
    rows = table.rows_of([table.views[2].param, stranger, table.views[1].param])
    assert rows.table is table
    assert rows.starts == [9, -1, 4]
    assert rows.dims[2] == 1
    assert table.rows_of([stranger]).table is None


def test_a_new_table_has_all_rows_live_and_counts_nothing() -> None:
    table = _table()
    assert (table.countdown == LIVE).all()
    assert table.threshold.isposinf().all()
    for name in ("penalty", "sums", "activity", "channel_dot", "channel_dot_sq", "updates"):
        assert not getattr(table, name).any()
    arrays = [(n, v) for n, v in table.state_dict().items() if n not in ("tau", "decay")]
    dtypes = {name: value.dtype for name, value in arrays}
    assert dtypes.pop("countdown") is torch.int32
    assert {dtypes.pop(name) for name in ("nonfinite", "gate_offsets", "gate_rows")} == {torch.int64}


@pytest.mark.parametrize(
    "gates",
    [
        [np.array([0, 9]), np.array([], dtype=int), np.array([2])],
        [[0, 9], [], [2]],
        (np.array([0, 2, 2, 3]), np.array([0, 9, 2])),
    ],
)
def test_gates_come_as_lists_or_compressed(gates: Any) -> None:
    table = RowTable([(Parameter(torch.zeros(10)), 0)], gates)
    assert table.gate_offsets.tolist() == [0, 2, 2, 3]
    assert table.gate_rows.tolist() == [0, 9, 2]
    assert len(table.channel_dot) == 3


def test_no_parameters_and_no_gates() -> None:
    table = RowTable([], [])
    assert table.views == [] and len(table.penalty) == 0 and len(table.channel_dot) == 0


@pytest.mark.parametrize(
    ("params", "gates", "options", "message"),
    [
        ([((4, 3), 2)], [], {}, r"params\[0\].*dimension 2.*\[4, 3\]"),
        ([((4, 3), -1)], [], {}, r"params\[0\].*dimension -1"),
        ([((), 0)], [], {}, r"params\[0\].*dimension 0"),
        ([((4,), 0)], [[4]], {}, r"gates.*4.*\[0, 4\)"),
        ([((4,), 0)], [[-1]], {}, r"gates.*-1"),
        ([((4,), 0)], ([0, 2], [1]), {}, r"gates: got offsets"),
        ([((4,), 0)], ([0, 2, 1, 3], [1, 2, 3]), {}, r"gates: got offsets"),
        ([((4,), 0)], ([], []), {}, r"gates: got offsets"),
        ([((4,), 0)], [], {"tau": 0.0}, r"tau: got 0.0"),
        ([((4,), 0)], [], {"decay": 1.0}, r"decay: got 1.0"),
        ([((4,), 0)], [], {"decay": float("nan")}, r"decay: got nan"),
    ],
)
def test_refused(params: Any, gates: Any, options: dict[str, float], message: str) -> None:
    tracked = [(Parameter(torch.zeros(shape)), dim) for shape, dim in params]
    with pytest.raises(ValueError, match=message):
        RowTable(tracked, gates, **options)


def test_refuses_a_parameter_twice_and_two_devices() -> None:
    param = Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"params\[1\].*a second time"):
        RowTable([(param, 0), (param, 0)], [])
    with pytest.raises(ValueError, match=r"params\[1\].*on meta.*cpu"):
        RowTable([(param, 0), (Parameter(torch.zeros(4, device="meta")), 0)], [])


def _scramble(table: RowTable) -> None:
    for value in table.state_dict().values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.copy_(torch.rand_like(value))
    table.countdown[::2] = 0
    table.nonfinite.fill_(7)


def test_state_dict_goes_through_a_file_into_another_table() -> None:
    table = _table(tau=1.5, decay=0.5)
    _scramble(table)
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    other = _table()
    addresses = {name: getattr(other, name).data_ptr() for name in ("sums", "countdown", "updates")}
    other.pending.fill_(1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name, value in table.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(other, name), value), name
    assert (other.tau, other.decay) == (1.5, 0.5)
    assert other.pending == 0
    assert other.masked == [2, 3, 2]
    # In place, because kernels may keep the addresses.
    assert addresses == {name: getattr(other, name).data_ptr() for name in addresses}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: state.pop("activity"), ValueError, "activity"),
        (lambda state: state.pop("decay"), ValueError, "decay"),
        (lambda state: state.update(sums=torch.zeros(13, 3)), ValueError, r"sums.*\[13, 3\]"),
        (lambda state: state.update(penalty=torch.zeros(13).double()), ValueError, "float64"),
        (
            lambda state: state.update(gate_rows=torch.tensor([0, 8, 2])),
            ValueError,
            "gate_rows.*another model",
        ),
    ],
)
def test_load_refuses_and_changes_nothing(change: Any, error: type[Exception], message: str) -> None:
    source = _table()
    _scramble(source)
    state = source.state_dict()
    change(state)
    table = _table()
    before = copy.deepcopy(table.state_dict())
    with pytest.raises(error, match=message):
        table.load_state_dict(state)
    for name, value in before.items():
        same = torch.equal(value, getattr(table, name)) if name != "tau" and name != "decay" else 1
        assert same, name


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))])
def test_a_copy_finds_its_own_parameters(duplicate: Any) -> None:
    table = _table()
    _scramble(table)
    twin = duplicate(table)
    for view in twin.views:
        assert twin.index[id(view.param)] is view
    assert not any(id(view.param) in twin.index for view in table.views)
    assert torch.equal(twin.sums, table.sums) and twin.sums is not table.sums


def test_zero_masked_zeroes_rows_of_weights_and_state_and_nothing_else() -> None:
    table = _table()
    table.countdown[[1, 4 + 3, 9]] = 0
    table.refresh()
    assert table.masked == [1, 1, 1]
    states = {id(view.param): [torch.ones_like(view.param), torch.ones(())] for view in table.views}
    before = [view.param.detach().clone() for view in table.views]
    table.zero_masked(lambda param: states[id(param)])
    for view, old, row in zip(table.views, before, [1, 3, 0], strict=True):
        keep = torch.arange(view.rows) != row
        for tensor, was in ((view.param, old), (states[id(view.param)][0], torch.ones_like(old))):
            now = tensor.detach().movedim(view.dim, 0)
            assert not now[row].any()
            assert torch.equal(now[keep], was.movedim(view.dim, 0)[keep])
        assert states[id(view.param)][1] == 1
