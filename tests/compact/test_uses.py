"""What people do with a module, done with a compact one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compact.networks import KEPT, Chain, chain, chain_plan, mask_chain, plan_for
from torch import Tensor, nn

from sparsekern.compact import compact, plan_of, verify

INPUT = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small() -> Chain:
    model = mask_chain(chain())
    result = compact(model, chain_plan(model))
    assert isinstance(result, Chain)
    return result


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_remember_the_plan(
    small: Chain, through: Callable[[nn.Module], nn.Module]
) -> None:
    again = through(small)
    assert verify(small, again, INPUT) == 0
    assert plan_of(again) == plan_of(small) == chain_plan(Chain())
    assert again.depth.groups == 5


def test_a_pickle_opens_without_this_package(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU())
    plan = plan_for(model, {name: {0: KEPT} for name in ("0.weight", "0.bias")})
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(compact(model, plan)))
    code = (
        "import pickle, sys; sys.modules['sparsekern'] = None; "
        "assert pickle.load(open('model.pickle', 'rb'))[0].out_features == 5"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_takes_the_whole_graph(small: Chain, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    assert verify(small, compiled, INPUT) < 1e-14
    small.train()
    compiled(INPUT).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_export_and_reload(small: Chain) -> None:
    small.eval()
    program = torch.export.export(small, (INPUT,))
    torch.testing.assert_close(program.module()(INPUT), small(INPUT), rtol=0, atol=1e-14)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    torch.testing.assert_close(again(INPUT), small(INPUT), rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trace_script_and_symbolic_trace(small: Chain) -> None:
    small.eval()
    with torch.no_grad():
        expected = small(INPUT)
        for module in (torch.fx.symbolic_trace(small), torch.jit.trace(small, INPUT)):
            torch.testing.assert_close(module(INPUT), expected, rtol=0, atol=1e-14)


def test_training_goes_on(small: Chain) -> None:
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    target = torch.zeros(2, 4, dtype=torch.float64)

    def loss() -> Tensor:
        return nn.functional.mse_loss(small(INPUT), target)

    before = loss().item()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before


def test_state_dicts_pass_between_copies(small: Chain) -> None:
    other = compact(Chain().to(torch.float64), plan_of(small))
    other.load_state_dict(small.state_dict())
    assert verify(small, other, INPUT) == 0
