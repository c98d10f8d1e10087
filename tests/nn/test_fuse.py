"""Fused networks compute what they computed, can be undone, and are pruned as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision_models import models

from sparsekern.compact import compact, make_plan, shrink, verify
from sparsekern.fusion import fuse, unfuse
from sparsekern.graph import trace
from sparsekern.nn import MultiheadAttention, NormAct2d
from sparsekern.recipes.models import UNet, lraspp_mobilenetv3

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(3, 1, width=4),
    "mobilenetv3": lambda: lraspp_mobilenetv3("small", classes=1),
    "resnet18": lambda: models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=5),
}


def example(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def results(model: nn.Module) -> list[Tensor]:
    """Outputs in both modes, gradients, running statistics."""
    model.train()
    torch.manual_seed(1)
    y = model(example())
    y.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    buffers = [b.clone() for b in model.buffers()]
    model.eval()
    with torch.no_grad():
        return [y.detach(), model(example()), *grads, *buffers]


def near(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    for mine, theirs in zip(got, want, strict=True):
        largest = max(1.0, theirs.double().abs().max().item())
        assert (mine.double() - theirs.double()).abs().max() <= tolerance * largest


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_what_it_computed_and_can_be_undone(name: str) -> None:
    plain = network(name)
    fused = copy.deepcopy(plain)
    parameters, keys = list(fused.parameters()), list(fused.state_dict())
    fusion = fuse(fused, example())
    norms = [m for m in plain.modules() if type(m) is nn.BatchNorm2d]
    assert len(fusion.fused) == len(norms) == sum(type(m) is NormAct2d for m in fused.modules())
    assert list(fused.state_dict()) == keys
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    want = results(plain)
    near(results(fused), want)
    others = (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)))
    fusion.undo()
    for model in (fused, *others):
        unfuse(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in plain.modules()]
    near([fused.eval()(example()).detach()], [plain.eval()(example()).detach()])


def test_which_norms_take_over_an_activation() -> None:
    found = {one.norm: one for one in fuse(network("resnet18"), example()).fused}
    assert found["bn1"].activations == ("relu",) and found["bn1"].kind == "relu"
    assert found["layer1.0.bn1"].reason == "its activation layer1.0.relu is called elsewhere, too"
    assert "aten.add_.Tensor follows it" in found["layer1.0.bn2"].reason
    fusion = fuse(network("unet"), example())
    assert all(one.kind == "relu" for one in fusion.fused)
    assert f"{len(fusion.fused)} of {len(fusion.fused)} batch norms compute their activation" in str(fusion)
    kinds = {one.kind for one in fuse(network("mobilenetv3"), example()).fused}
    assert kinds == {"relu", "hardswish", "identity"}


class Corners(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(7))
        self.shared, self.hooked, self.own, self.capped = nn.ReLU(), nn.ReLU(), nn.SiLU(), nn.Hardtanh(0, 6)
        self.hooked.register_forward_hook(lambda *_: None)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norms[0](self.conv(x)))
        x = self.shared(self.norms[1](self.inner[0](x)))
        z = self.norms[2](self.inner[1](x))
        x = self.own(z) + z
        x = self.hooked(self.norms[3](self.inner[2](x)))
        x = torch.relu(self.norms[4](self.inner[3](x)))
        x = self.capped(self.norms[5](self.inner[4](x)))
        # A norm that is called twice, once without an activation.
        return self.norms[6](self.shared(self.norms[6](self.inner[5](x))))


def test_corners() -> None:
    torch.manual_seed(0)
    plain = Corners().double()
    fused = copy.deepcopy(plain)
    found = {one.norm.removeprefix("norms."): one for one in fuse(fused, example()).fused}
    assert found["5"].kind == "relu6" and found["5"].activations == ("capped",)
    # The call behind norm 6, which stays alone, keeps the shared activation from norms 0 and 1.
    for name in "01":
        assert found[name].reason == "its activation shared is called elsewhere, too"
    assert "2 operations read what it gives" in found["2"].reason
    assert "hooked has hooks" in found["3"].reason
    assert "aten.relu follows it" in found["4"].reason
    assert "the output of the model follows it" in found["6"].reason
    assert found["unused"].reason == "it is not called"
    near(results(fused), results(plain))


def test_a_shared_activation_behind_fused_norms_only() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.n, self.m, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.m(self.b(self.relu(self.n(self.a(x))))))

    plain = Shared().double()
    fused = copy.deepcopy(plain)
    assert [one.activations for one in fuse(fused, example()).fused] == [("relu",), ("relu",)]
    near(results(fused), results(plain))


def test_fused_twice_is_fused_once() -> None:
    model = network("unet")
    fuse(model, example())
    assert fuse(model, example()).fused == ()
    own = nn.Sequential(NormAct2d(3))
    unfuse(own)
    assert type(own[0]) is NormAct2d


@pytest.mark.parametrize("name", ["unet", "mobilenetv3"])
def test_is_pruned_as_before(name: str) -> None:
    plain = network(name)
    fused = copy.deepcopy(plain)
    fuse(fused, example())
    graphs = [trace(model, example()) for model in (plain, fused)]
    assert [g.name for g in graphs[0].groups] == [g.name for g in graphs[1].groups]
    assert graphs[0].cost(np.ones(graphs[0].num_channels, bool)) == graphs[1].cost(
        np.ones(graphs[1].num_channels, bool)
    )
    kept = np.ones(graphs[1].num_channels, bool)
    for group in graphs[1].groups:
        kept[group.channels[::2]] = len(group.channels) < 2
    plan = make_plan(graphs[1], kept)
    small = [compact(model, plan).eval() for model in (plain, fused)]
    assert any(type(m) is NormAct2d for m in small[1].modules())
    assert verify(small[0], small[1], example()) < 1e-12
    for module in fused.modules():
        if isinstance(module, NormAct2d):
            module.mask = torch.zeros(module.num_features, dtype=torch.bool)
    shrink(fused, plan)
    assert verify(small[0], fused.eval(), example()) < 1e-12
    unfuse(small[1])
    assert verify(small[0], small[1], example()) < 1e-12


def test_bad_input_changes_nothing() -> None:
    model = network("unet")
    with pytest.raises(ValueError, match="example_inputs: got"):
        fuse(model, torch.zeros(2, 5, 64, 64, dtype=torch.float64))
    assert not any(isinstance(m, NormAct2d) for m in model.modules())
    for function in (lambda: fuse("model", example()), lambda: unfuse("model")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="model: got str, expected a torch.nn.Module"):
            function()


def test_names_of_the_package() -> None:
    import sparsekern

    expected: list[Any] = [MultiheadAttention, NormAct2d, fuse, unfuse]
    assert [sparsekern.nn.MultiheadAttention, sparsekern.nn.NormAct2d] == expected[:2]
    assert [sparsekern.fusion.fuse, sparsekern.fusion.unfuse] == expected[2:]


@pytest.mark.parametrize("name", ["Fusion", "fuse", "unfuse"])
def test_the_old_names_warn_for_a_release(name: str) -> None:
    import sparsekern

    with pytest.warns(DeprecationWarning, match=f"sparsekern.nn.{name} is now sparsekern.fusion.{name}"):
        assert getattr(sparsekern.nn, name) is getattr(sparsekern.fusion, name)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        sparsekern.nn.other  # noqa: B018
