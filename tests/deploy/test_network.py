"""deploy: which norms are folded, what is removed, and that the copy equals the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compact.networks import unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import sparsekern
from benchmarks.networks import randomise
from sparsekern.compact import plan_of
from sparsekern.deploy import fold as folding
from sparsekern.deploy import network as deploying
from sparsekern.deploy.fold import batch_norms
from sparsekern.nn import NormAct2d


class Forward(nn.Module):
    """Modules by name, and a function that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class WithoutBias(nn.Conv2d):
    """A convolution whose forward never adds its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, None, self.stride, self.padding)  # type: ignore[arg-type]


class NormWithActivation(nn.BatchNorm2d):
    """A norm that calls the activation that it contains, as timm's do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def conv(groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias)


def norm(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, **options)


def tied() -> nn.Module:
    model = nn.Sequential(conv(), norm(), conv())
    model[2].weight = model[0].weight
    return model


def reads_gamma(m: Any, x: Tensor) -> Tensor:
    return m.n(m.c(x)) * m.n.weight.sum()


image = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
line = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

# Network, input, and number of norms that stay.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "in another order than registered": (
        lambda: Forward(lambda m, x: m.n(m.c(x)), n=norm(), c=conv()),
        image,
        0,
    ),
    "without affine": (lambda: nn.Sequential(conv(bias=True), norm(affine=False)), image, 0),
    "grouped": (lambda: nn.Sequential(conv(2), norm(), conv(4), norm()), image, 0),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.ConvTranspose2d(6, 9, 2, groups=3),
            nn.BatchNorm2d(9),
            nn.ConvTranspose2d(9, 9, 2, groups=9, bias=False),
            nn.BatchNorm2d(9),
        ),
        image,
        0,
    ),
    "one and three dimensions": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, padding="same"),
            nn.BatchNorm1d(4),
            nn.Unflatten(2, (1, 1, 7)),
            nn.Conv3d(4, 2, 1),
            nn.BatchNorm3d(2),
            nn.ConvTranspose3d(2, 2, (1, 1, 2)),
            nn.BatchNorm3d(2),
        ),
        line,
        0,
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), rows, 0),
    "linear over positions": (lambda: nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), line, 1),
    "read twice": (lambda: Forward(lambda m, x: m.n(y := m.c(x)) + y, c=conv(), n=norm()), image, 1),
    "returned, too": (lambda: Forward(lambda m, x: (m.n(y := m.c(x)), y), c=conv(), n=norm()), image, 1),
    "pair called twice": (lambda: Forward(lambda m, x: m.n(m.c(m.n(m.c(x)))), c=conv(), n=norm()), image, 0),
    "norm of two layers": (
        lambda: Forward(lambda m, x: m.n(m.d(m.n(m.c(x)))), c=conv(), d=conv(), n=norm()),
        image,
        1,
    ),
    "layer before two norms": (
        lambda: Forward(lambda m, x: m.o(m.c(m.n(m.c(x)))), c=conv(), n=norm(), o=norm()),
        image,
        2,
    ),
    "norm of the input": (lambda: nn.Sequential(norm(), conv()), image, 1),
    "activation between": (lambda: nn.Sequential(conv(), nn.ReLU(), norm()), image, 1),
    "tied": (tied, image, 1),
    "gamma read elsewhere": (lambda: Forward(reads_gamma, c=conv(), n=norm()), image, 1),
    "batch statistics": (lambda: nn.Sequential(conv(), norm(track_running_stats=False)), image, 1),
    "no bias possible": (lambda: nn.Sequential(WithoutBias(4, 4, 1, bias=False), norm()), image, 1),
    "fused activation": (
        lambda: nn.Sequential(conv(), NormAct2d(4, activation="hardswish"), conv()),
        image,
        0,
    ),
    "contained activation": (lambda: nn.Sequential(conv(), NormWithActivation(4)), image, 0),
    "computed weights": (
        lambda: nn.Sequential(parametrizations.weight_norm(conv()), norm(), weight_norm(conv(2)), norm()),
        image,
        0,
    ),
    "picked by number": (
        lambda: Forward(lambda m, x: m.s[1](m.s[0](x)) + m.s(x), s=nn.Sequential(conv(), norm(), nn.ReLU())),
        image,
        0,
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("case", CASES)
def test_norms_are_folded_where_the_graph_allows_it(case: str) -> None:
    make, x, stay = CASES[case]
    torch.manual_seed(0)
    model = make()
    randomise(model)
    model = model.double().train()
    with unchanged(model):
        deployed = sparsekern.deploy(model, x)
    assert sparsekern.verify(model, deployed, x) < 1e-12
    assert len(list(batch_norms(deployed))) == stay
    assert model.training and not any(module.training for module in deployed.modules())
    assert not any(parameter.requires_grad for parameter in deployed.parameters())


def test_dropout_and_identities_go_and_names_stay() -> None:
    model = nn.Sequential(
        conv(), norm(), nn.Dropout(0.5), nn.Identity(), nn.Sequential(nn.Dropout2d()), conv()
    )
    deployed = sparsekern.deploy(model.double(), image)
    assert [name for name, _ in deployed.named_children()] == ["0", "5"]


def test_items_that_a_forward_picks_by_number_keep_their_place() -> None:
    run = lambda m, x: m.s[2](m.s(x))  # noqa: E731
    model = Forward(run, s=nn.Sequential(conv(), nn.Dropout(0.5), nn.ReLU())).double()
    deployed: Any = sparsekern.deploy(model, image)
    assert isinstance(deployed.s[1], nn.Identity)


def test_a_hook_that_reads_is_removed() -> None:
    seen: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    model = nn.Sequential(conv(), norm()).double()
    model[0].register_forward_hook(read)
    deployed = sparsekern.deploy(model, image)
    seen.clear()
    deployed(image)
    assert not seen and model[0]._forward_hooks
    assert not list(batch_norms(deployed))


def test_a_hook_that_changes_outputs_is_named() -> None:
    model = nn.Sequential(conv(), norm()).double()
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=r"^small: .* differs by .*, expected at most 1e-12; hooks of 0 are"):
        sparsekern.deploy(model, image)


def test_a_wrong_fold_is_refused_with_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layer: Any, norm: nn.Module) -> None:
        layer.weight = nn.Parameter(layer.weight * 1.01)

    monkeypatch.setattr(folding, "_fold_weights", wrong)
    model = nn.Sequential(conv(), norm()).double()
    with pytest.raises(ValueError, match=r"^small: the deployed copy differs by [\d.]+e-0\d of the largest"):
        sparsekern.deploy(model, image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm())
    randomise(model)
    deployed = sparsekern.deploy(model.to(dtype), image.to(dtype))
    assert {parameter.dtype for parameter in deployed.parameters()} == {dtype}


@pytest.mark.parametrize("faster", [torch.contiguous_format, torch.channels_last])
def test_the_faster_memory_format_is_chosen(
    faster: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        deploying, "_seconds", lambda runs, _: {form: 1.0 + (form != faster) for form in runs}
    )
    deployed = sparsekern.deploy(nn.Sequential(conv()).double(), image)
    assert deployed[0].weight.is_contiguous(memory_format=faster)  # type: ignore[index, union-attr]


def test_a_compact_network_forgets_its_plan_and_the_original_keeps_it() -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    small = sparsekern.prune_once(model, image, keep=0.6, select="magnitude").network
    deployed = sparsekern.deploy(small, image)
    assert not plan_of(small).removes_nothing and plan_of(deployed).removes_nothing
    assert sparsekern.verify(small, deployed, image) < 1e-12


BAD: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no module": (3, image, {}, "small: got int, expected a torch.nn.Module"),
    "another input": (conv(), rows, {}, "example_inputs: got"),
    "a format": (conv(), image, {"memory_format": torch.preserve_format}, "memory_format: got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    model, x, options, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        sparsekern.deploy(model.double() if isinstance(model, nn.Module) else model, x, **options)
