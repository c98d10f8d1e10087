"""Common uses of a module, applied to a compact one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from compact.kinds import KINDS, halved, image
from compact.networks import KEPT, Chain, chain, chain_plan, mask_chain, plan_for
from torch import Tensor, nn

from sparsekern.compact import Plan, compact, load, plan_of, save, verify

# The name of a kind, a masked network of it, its plan, and the compact one.
Halves = tuple[str, nn.Module, Plan, nn.Module]

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


@pytest.fixture(scope="module", params=KINDS)
def halves(request: pytest.FixtureRequest) -> Halves:
    return request.param, *halved(request.param)


def output(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = module(x)
    assert isinstance(found, Tensor)
    return found


def test_every_kind_computes_what_its_masked_network_does(
    halves: Halves,
) -> None:
    _, model, plan, small = halves
    assert verify(model, small, image()) < 1e-5
    assert output(small, image()).std() > 1e-3
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert plan_of(small) == plan


def test_every_kind_copies_averages_and_reloads(halves: Halves, tmp_path: Path) -> None:
    kind, _, plan, small = halves
    assert verify(small, copy.deepcopy(small), image()) == 0
    averaged = torch.optim.swa_utils.AveragedModel(small)
    averaged.update_parameters(small)
    assert verify(small, averaged, image()) == 0
    other = copy.deepcopy(small)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    averaged.update_parameters(other)
    for mean, first in zip(averaged.module.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(mean, first + 0.5)
    save(small, tmp_path / "small.safetensors")
    again = load(KINDS[kind]().eval(), tmp_path / "small.safetensors")
    assert verify(small, again, image()) == 0
    assert plan_of(again) == plan


def test_every_kind_exports_and_runs_in_onnxruntime(halves: Halves, tmp_path: Path) -> None:
    small = halves[3]
    expected = output(small, image(1))
    exported = torch.export.export(small, (image(),))
    torch.testing.assert_close(output(exported.module(), image(1)), expected, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made by the exporter
        program = torch.onnx.export(exported, (image(),), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "small.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", options)
    (found,) = session.run(None, {session.get_inputs()[0].name: image(1).numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


def test_every_kind_compiles_and_trains_on(halves: Halves) -> None:
    small = copy.deepcopy(halves[3])
    torch.compiler.reset()
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert verify(small, compiled, image()) < 1e-5
    compiled(image()).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_inductor_computes_the_same(small: Chain) -> None:
    torch.compiler.reset()
    compiled = torch.compile(small.eval(), fullgraph=True)
    assert verify(small, compiled, INPUT) < 1e-12
