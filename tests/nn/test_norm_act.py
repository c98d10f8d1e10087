"""NormAct2d is torch's BatchNorm2d with its activation, and keeps less."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsekern.kernels.counts import ChannelCounts
from sparsekern.nn import NormAct2d

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
}


def pair(activation: str = "relu", **options: Any) -> tuple[nn.BatchNorm2d, NormAct2d]:
    """torch's module, and ours with the same state."""
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(6, **options), NormAct2d(6, **options, activation=activation)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-1, 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def data(dtype: torch.dtype = torch.float64, memory: torch.memory_format = torch.contiguous_format) -> Tensor:
    values = torch.randn(3, 6, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return values.to(dtype).contiguous(memory_format=memory)


def passes(module: nn.Module, after: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """Outputs, gradients and buffers of some steps."""
    found: list[Tensor] = []
    for step in range(steps):
        inputs = x.clone().mul_(step + 1).requires_grad_()
        module.zero_grad()
        y = after(module(inputs))
        y.backward(torch.cos(torch.arange(y.numel(), dtype=x.dtype)).reshape(y.shape))
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        assert inputs.grad is not None
        found += [y.detach(), inputs.grad, *grads, *(b.clone() for b in module.buffers())]
    return found


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_torch(activation: str, memory: torch.memory_format) -> None:
    theirs, ours = pair(activation, dtype=torch.float64)
    want = passes(theirs, ACTIVATIONS[activation](), data(memory=memory))
    got = passes(ours, nn.Identity(), data(memory=memory))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    theirs.eval()
    ours.eval()
    want = passes(theirs, ACTIVATIONS[activation](), data(memory=memory))
    for mine, other in zip(passes(ours, nn.Identity(), data(memory=memory)), want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}],
    ids=str,
)
def test_options_are_torchs(options: dict[str, Any]) -> None:
    theirs, ours = pair(**options, dtype=torch.float64)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        for mine, other in zip(
            passes(ours, nn.Identity(), data()), passes(theirs, nn.ReLU(), data()), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_half_precision_in_autocast_and_as_a_whole() -> None:
    """bfloat16 data with float32 parameters, as behind a convolution in autocast; and all in bfloat16."""
    theirs, ours = pair("hardswish")
    x = data(torch.bfloat16)
    for _ in range(2):
        y = ours(x)
        assert y.dtype == torch.bfloat16
        # Torch rounds once more, between the normalisation and the activation.
        torch.testing.assert_close(y.float(), nn.Hardswish()(theirs(x)).float(), rtol=0.02, atol=0.02)
        theirs, ours = theirs.bfloat16(), ours.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        model = nn.Sequential(nn.Conv2d(6, 6, 1), NormAct2d(6))
        model(data(torch.float32)).sum().backward()
    assert model[1].weight.grad is not None and model[1].weight.grad.dtype == torch.float32


def test_residual_is_added_before_the_activation() -> None:
    theirs, ours = pair(dtype=torch.float64)
    x, residual = data().requires_grad_(), data().neg().requires_grad_()
    want = torch.autograd.grad((theirs(x) + residual).relu().square().sum(), (x, residual, theirs.weight))
    got = torch.autograd.grad(ours(x, residual).square().sum(), (x, residual, ours.weight))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
def test_mask_changes_nothing_where_the_affine_is_zero(residual: bool) -> None:
    _, plain = pair("silu", dtype=torch.float64)
    gone = torch.tensor([False, True, False, False, True, False])
    with torch.no_grad():
        plain.weight[gone] = 0
        plain.bias[gone] = 0
    masked = copy.deepcopy(plain)
    masked.mask = gone
    results = []
    for module in (plain, masked):
        x, r = data().requires_grad_(), data().neg().requires_grad_() if residual else None
        y = module(x, r)
        y.square().sum().backward()
        assert x.grad is not None and module.weight.grad is not None and module.bias.grad is not None
        kept = ~gone
        results.append([y, x.grad, module.weight.grad[kept], module.bias.grad[kept]])
        results[-1] += [] if r is None or r.grad is None else [r.grad]
        results[-1] += [module.running_mean[kept], module.running_var[kept]]
    for mine, other in zip(results[1], results[0], strict=True):
        assert torch.equal(mine, other)
    assert masked.weight.grad is not None and (masked.weight.grad[gone] == 0).all()
    torch.testing.assert_close(masked.running_var[gone], torch.ones(2, dtype=torch.float64))
    assert (masked.running_mean[gone] == 0).all()


def test_counts_shares_of_gradients_above_a_scale_free_threshold() -> None:
    _, module = pair(dtype=torch.float64)
    module.counts = ChannelCounts.zeros(6)
    x = data()
    grad = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def step() -> Tensor:
        y = module(x)
        y.backward(grad)
        return torch.where(y > 0, grad, 0)

    dz = step()
    norm = (module.weight.square() + module.bias.square()).sqrt().detach()
    rms = (dz.square().mean((0, 2, 3)) * norm.square()).mean().sqrt()
    torch.testing.assert_close(module.counts.threshold, (rms / norm).float())
    assert (module.counts.activity == 0).all() and module.counts.updates == 1
    dz = step()
    share = (dz.abs() > (rms / norm)[None, :, None, None]).double().mean((0, 2, 3))
    torch.testing.assert_close(module.counts.activity, (share * 0.01).float())
    assert copy.deepcopy(module).counts is None, "counts belong to a training"


def test_keeps_half_of_what_torch_keeps_for_the_backward_pass() -> None:
    def kept(function: Any) -> int:
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(torch.randn(8, 6, 32, 32, requires_grad=True))
        return sum(storages.values())

    for activation, kind in ACTIVATIONS.items():
        theirs, ours = pair(activation)
        after = kind()
        whole = kept(lambda x, theirs=theirs, after=after: after(theirs(x)))
        assert kept(ours) <= (1.0 if activation == "identity" else 0.6) * whole


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3), NormAct2d(6, activation="hardswish"), nn.Conv2d(6, 2, 1))
    model[1].counts = ChannelCounts.zeros(6)
    eager = copy.deepcopy(model)
    eager[1].counts = ChannelCounts.zeros(6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        for module in (compiled, eager):
            module(data(torch.float32)).square().sum().backward()
    assert model[1].counts is not None and model[1].counts.updates == 3
    assert torch.equal(model[1].counts.activity, eager[1].counts.activity)
    for (name, mine), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    for mine, other in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_as_torchs_operators(strict: bool) -> None:
    module = NormAct2d(6, activation="hardswish").eval()
    program = torch.export.export(module, (data(torch.float32),), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("sparsekern" in name for name in names)
    torch.testing.assert_close(program.module()(data(torch.float32)), module(data(torch.float32)))


def test_adopt_and_release_keep_the_object() -> None:
    norm = nn.BatchNorm2d(6)
    weight, keys = norm.weight, list(norm.state_dict())
    NormAct2d.adopt(norm, "silu")
    assert type(norm) is NormAct2d and norm.weight is weight and list(norm.state_dict()) == keys
    assert "activation=silu" in repr(norm)
    norm.counts = ChannelCounts.zeros(6)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is NormAct2d and other.counts is None
        assert torch.equal(other(data(torch.float32)), copy.deepcopy(norm)(data(torch.float32)))
    NormAct2d.release(norm)
    assert type(norm) is nn.BatchNorm2d and not norm.__dict__.keys() & {"activation", "mask", "counts"}
    for wrong in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3), NormAct2d(3)):
        with pytest.raises(ValueError, match=f"norm: got a {type(wrong).__name__}, expected a BatchNorm2d"):
            NormAct2d.adopt(wrong, "relu")  # type: ignore[arg-type]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="activation: got 'gelu', expected one of identity, relu"):
        NormAct2d(3, activation="gelu")
    module = NormAct2d(3)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        module(torch.zeros(1, 3, 1, 1))
    assert module.num_batches_tracked == 0
