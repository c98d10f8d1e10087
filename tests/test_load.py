"""`sparsekern.load`: files that name their network, and the errors for files that do not fit."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors import safe_open

import sparsekern
from sparsekern.compact import make_plan
from sparsekern.recipes.models import UNet, lraspp_mobilenetv3
from sparsekern.recipes.networks import NetworkSpec, Padded

SPECS = {
    "unet": NetworkSpec("unet", 4, 2, "transposed", 2),
    "bilinear": NetworkSpec("unet", 4, 2, "bilinear", 5),
    "large": NetworkSpec("mobilenetv3", 0.25, 4, "transposed", 2),
    "small": NetworkSpec("mobilenetv3-small", None, 4, "transposed", 3),
}


def stored(spec: NetworkSpec, path, made_by=None) -> torch.nn.Module:
    """A network with half of its channels, in a file."""
    torch.manual_seed(0)
    model = spec.build().eval()
    graph = sparsekern.trace(model, torch.randn(1, 3, 64, 64))
    kept = torch.arange(graph.num_channels).numpy() % 2 == 0
    small = sparsekern.compact(model, make_plan(graph, kept))
    sparsekern.save(small, path, made_by=spec.to_json("1.2.3") if made_by is None else made_by)
    return small


@pytest.mark.parametrize("name", SPECS)
def test_a_file_alone_gives_the_network_that_was_saved(name, tmp_path):
    small = stored(SPECS[name], tmp_path / "a.safetensors")
    again = sparsekern.load(tmp_path / "a.safetensors")
    assert type(again) is type(small) and not again.training
    expected, found = small.state_dict(), again.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    # With the module, as before; the specification's own text makes it.
    assert (
        sparsekern.load(SPECS[name].build(), tmp_path / "a.safetensors").state_dict().keys()
        == expected.keys()
    )


def test_a_module_that_does_not_fit_is_told_which_factory_does(tmp_path):
    path = tmp_path / "a.safetensors"
    stored(SPECS["unet"], path)
    with pytest.raises(ValueError) as caught:
        sparsekern.load(UNet(3, 2, width=4, depth=2), path)
    message = str(caught.value)
    call = "UNet(3, 1, width=4, depth=2, decoder='transposed'), which tells 2 classes apart by one logit"
    assert "head.weight" in message and call in message
    assert f"load({str(path)!r}) alone rebuilds it" in message
    with pytest.raises(ValueError, match=r"UNet\(3, 1, width=4.*alone rebuilds it"):
        sparsekern.load(torch.nn.Linear(2, 2), path)


def test_the_text_of_a_specification_is_a_call_that_makes_the_network():
    names = {"UNet": UNet, "lraspp_mobilenetv3": lraspp_mobilenetv3}
    for spec in SPECS.values():
        call = str(spec).partition(", which")[0].removeprefix("sparsekern.recipes.models.")
        assert eval(call, names).state_dict().keys() == spec.build().state_dict().keys()


def test_a_file_that_does_not_say_what_it_holds_asks_for_the_module(tmp_path):
    sparsekern.save(torch.nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"a\.safetensors', which does not name the factory of its Linear, expected"
    ):
        sparsekern.load(tmp_path / "a.safetensors")
    assert (
        torch.nn.Linear(2, 2).state_dict().keys()
        == sparsekern.load(torch.nn.Linear(2, 2), tmp_path / "a.safetensors").state_dict().keys()
    )


GOOD = SPECS["unet"].to_json("1.2.3")
HOSTILE = {
    "no recipe": {},
    "a list": {"recipe": ["unet"]},
    "import path": {**GOOD, "recipe": "os:system"},
    "too wide": {**GOOD, "settings": {"width": 10**9, "depth": 2, "decoder": "transposed"}},
    "too deep": {**GOOD, "settings": {"width": 4, "depth": 10**9, "decoder": "transposed"}},
    "factor": {
        **GOOD,
        "recipe": "mobilenetv3",
        "settings": {"width": 1e300, "depth": 2, "decoder": "transposed"},
    },
    "text": {**GOOD, "settings": {"width": "4", "depth": 2, "decoder": "transposed"}},
    "switch": {**GOOD, "classes": True},
    "null": {**GOOD, "settings": None},
    "mean": {**GOOD, "normalisation": {"mean": [0, 0], "std": [1, 1, 1]}},
    "std": {**GOOD, "normalisation": {"mean": [0, 0, 0], "std": [1, 0, 1]}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_says_is_checked_and_never_imported(name, tmp_path):
    path = tmp_path / "a.safetensors"
    sparsekern.save(SPECS["unet"].build(), path, made_by=HOSTILE[name])
    before = set(sys.modules)
    with pytest.raises(
        ValueError, match=r"a\.safetensors' of sparsekern .*, expected a network that this version can build"
    ):
        sparsekern.load(path)
    assert set(sys.modules) == before
    # The module's own word is enough, whatever the file says.
    sparsekern.load(SPECS["unet"].build(), path)


def test_a_file_that_says_another_network_than_it_holds_is_refused(tmp_path):
    stored(SPECS["unet"], tmp_path / "a.safetensors", made_by=SPECS["bilinear"].to_json("0"))
    with pytest.raises(ValueError, match="a.safetensors"):
        sparsekern.load(tmp_path / "a.safetensors")


def test_the_maker_is_under_the_checksum_and_has_to_be_plain(tmp_path):
    path = tmp_path / "a.safetensors"
    stored(SPECS["unet"], path)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["made_by"]) == GOOD
    content = path.read_bytes()
    assert content.count(b"transposed") == 1
    path.write_bytes(content.replace(b"transposed", b"bilinear  "))
    with pytest.raises(ValueError, match="was changed after it was saved"):
        sparsekern.load(path)
    for bad in ({"a": torch.ones(1)}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="made_by: got"):
            sparsekern.save(torch.nn.Linear(2, 2), tmp_path / "b.safetensors", made_by=bad)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("arguments", [(3,), (torch.nn.Linear(2, 2),), ("a", "b"), (None, "a")])
def test_arguments_of_other_types_are_refused(arguments):
    with pytest.raises(TypeError, match="got .*expected"):
        sparsekern.load(*arguments)


def test_padding_gives_what_a_larger_image_gives_cut_to_size():
    network = SPECS["unet"].build().eval()
    padded = Padded(network, SPECS["unet"].stride)
    x = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        assert torch.equal(padded(x), network(x))
        for height, width in ((1, 1), (7, 12), (5, 9)):
            assert padded(x[..., :height, :width]).shape == (2, 1, height, width)
