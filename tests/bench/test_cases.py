from __future__ import annotations

import pytest
import torchvision_models
from torch import nn

from sparsekern.bench import networks, norm
from sparsekern.bench.cases import CASES, DEVICES, select
from sparsekern.bench.comparisons import OPS


def test_every_case_names_what_there_is() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.op in OPS and case.backend in DEVICES
        tables = [networks.NETWORKS, networks.SHAPES]
        if case.op.startswith("norm_act"):
            tables = [norm.LAYERS]
        assert sum(case.tensors in table for table in tables) == 1
        assert case.masked is None or 0 <= case.masked <= 1
    assert set(OPS) == {case.op for case in CASES}
    assert {case.op for case in CASES} - {case.op for case in CASES if case.quick} == {"hooks-step"}


def test_whole_steps_and_iterations_of_all_networks() -> None:
    for op in ("adamw-step", "sgd-step", "adamw-iteration"):
        found = {case.tensors for case in select(f"^{op}/cpu/float32/.*/0%")}
        assert found >= set(networks.NETWORKS)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("unet-2m", 1.94), ("unet-31m", 31.0), ("mobilenetv3-seg", 3.22), ("resnet50", 25.6)],
)
def test_networks_have_the_size_that_they_are_known_by(name: str, millions: float) -> None:
    model = networks.NETWORKS[name].make()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.005)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def test_resnet50_is_the_known_one() -> None:
    mine = networks.NETWORKS["resnet50"].make().eval()
    theirs = torchvision_models.models.resnet50().eval()
    assert shapes(mine) == shapes(theirs)
    mine.load_state_dict(theirs.state_dict())
    batch = networks.Network(nn.Identity, images=1, edge=64).batch()
    assert (mine(batch) - theirs(batch)).abs().max() <= 1e-5 * theirs(batch).abs().max()


def test_filter_and_quick() -> None:
    chosen = select("^adam_step_/cpu/.*unet-2m/(0|80)%$", quick=True)
    assert [str(case) for case in chosen] == [
        "adam_step_/cpu/float32/unet-2m/0%",
        "adam_step_/cpu/float32/unet-2m/80%",
        "adam_step_/cpu/bfloat16/unet-2m/0%",
    ]
    assert select() == list(CASES)
    with pytest.raises(ValueError, match="--filter: got '\\[', expected a regular expression"):
        select("[")
    with pytest.raises(ValueError, match="--filter: got 'cuda', expected a part .* of --quick"):
        select("cuda", quick=True)
