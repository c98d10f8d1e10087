"""Folders with a model file and a card: what they hold, and that bad contents are refused. No network."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

import sparsekern
from sparsekern import hub
from sparsekern.recipes.networks import NetworkSpec

SPEC = NetworkSpec("unet", 2, 2, "bilinear", 3)
FIGURES = {"Dice": 0.7812345, "latency (ms)": 4.0}
WIDE = "encoder.2.0.weight"
CONTROLS = {"dense": {"Dice": 0.79}, "random | channels": {"Dice": 0.74, "latency (ms)": 4.1}}


def image() -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    network = SPEC.build()
    return sparsekern.prune_once(network, image(), keep=0.5, select="magnitude").network.eval()


@pytest.fixture(scope="module")
def saved(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "network"
    hub.save_folder(
        small,
        folder,
        factory=SPEC.to_json("0"),
        settings={"steps": 100, "lr": 1e-3, "select": ["taylor"]},
        figures=FIGURES,
        controls=CONTROLS,
        licence="apache-2.0",
    )
    return folder


def test_a_folder_gives_the_network_back_with_all_that_was_said(small: nn.Module, saved: Path) -> None:
    assert {file.name for file in saved.iterdir()} == set(hub.FILES)
    assert sparsekern.verify(small, sparsekern.from_hub(saved), image()) == 0
    assert sparsekern.verify(small, sparsekern.from_hub(saved, SPEC.build()), image()) == 0
    found = hub.read_folder(saved)
    assert found.figures == FIGURES and found.controls == CONTROLS and found.licence == "apache-2.0"
    assert found.settings["steps"] == 100 and found.factory == SPEC.to_json("0")
    assert found.plan.tensors[WIDE].new_shape == tuple(small.get_parameter(WIDE).shape)


def test_the_card_says_what_it_was_what_stays_and_the_controls(small: nn.Module, saved: Path) -> None:
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "sparsekern"
    before = sum(p.numel() for p in SPEC.build().parameters())
    after = sum(p.numel() for p in small.parameters())
    assert f"`UNet` of {before:,} parameters, of which {after:,} stay" in card.text
    assert "| | this network | dense | random \\| channels |" in card.text
    assert "| Dice | 0.7812 | 0.79 | 0.74 |" in card.text and "| latency (ms) | 4 |  | 4.1 |" in card.text
    assert f"| `{WIDE}` | [8, 4, 3, 3] | {list(small.get_parameter(WIDE).shape)} |" in card.text


def test_a_dense_network_without_figures_says_so(tmp_path: Path) -> None:
    hub.save_folder(nn.Linear(3, 2), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "None were measured." in card and "Everything." in card and "Licence: not stated" in card
    assert sparsekern.from_hub(tmp_path, nn.Linear(3, 2)).training
    hub.save_folder(nn.Linear(4, 2), tmp_path, figures={"loss": 0.5})  # an earlier folder may be replaced
    assert "No control was measured" in (tmp_path / "README.md").read_text()
    assert sparsekern.from_hub(tmp_path, nn.Linear(4, 2)).in_features == 4


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        about = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(about) or about))

    return apply


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no settings": (lambda folder: (folder / "sparsekern.json").unlink(), "cannot read"),
    "no plan": (lambda folder: (folder / "plan.json").unlink(), "cannot read"),
    "no JSON": (lambda folder: (folder / "sparsekern.json").write_text("{"), "sparsekern.json is no JSON"),
    "NaN": (
        lambda folder: (folder / "sparsekern.json").write_text('{"a": NaN}'),
        "sparsekern.json is no JSON",
    ),
    "a list": (lambda folder: (folder / "sparsekern.json").write_text("[]"), "sparsekern.json: got list"),
    "version": (
        changed("sparsekern.json", lambda a: a.update(version=2)),
        r"\['version'\]: got 2, expected 1",
    ),
    "format": (changed("sparsekern.json", lambda a: a.update(format="x")), r"\['format'\]: got 'x'"),
    "no licence": (
        changed("sparsekern.json", lambda a: {name: a[name] for name in a if name != "licence"}),
        "has no entry 'licence'",
    ),
    "an entry": (changed("sparsekern.json", lambda a: a.update(code="x")), "has an entry 'code'"),
    "figures": (changed("sparsekern.json", lambda a: a.update(figures=[])), r"\['figures'\]: got list"),
    "controls": (
        changed("sparsekern.json", lambda a: a.update(controls={"x": 1})),
        r"\['controls'\]\['x'\]: got 1",
    ),
    "factory": (changed("sparsekern.json", lambda a: a.update(factory={})), "names another factory"),
    "digest": (
        changed("sparsekern.json", lambda a: a.update(sha256="0")),
        "is not the one that sparsekern.json was",
    ),
    "plan": (changed("plan.json", lambda a: {**a, "tensors": {}}), "plan.json is not the plan of model"),
    "model": (flipped, "was changed after it was saved"),
    "no model": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
        "is not a safetensors file",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_contents_are_refused_with_one_error(case: str, saved: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    damage(folder)
    for load in (sparsekern.from_hub, hub.read_folder):
        with pytest.raises((ValueError, OSError), match=f"^folder: .*{message}"):
            load(folder)


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(
        ValueError, match=r"^folder: .* has README.md and no sparsekern.json, expected an empty"
    ):
        hub.save_folder(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=r"^folder: .*README.md' is a file, expected a folder"):
        hub.save_folder(nn.Linear(2, 2), tmp_path / "README.md")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "figures": ({"figures": {"loss": float("nan")}}, "figures: got what is no plain data"),
    "nested figures": ({"figures": {"loss": {"a": 1}}}, r"figures\['loss'\]: got dict"),
    "settings": ({"settings": {"optimizer": object()}}, "settings: got what is no plain data"),
    "controls": ({"controls": {"dense": 3}}, r"controls\['dense'\]: got 3, expected dict"),
    "licence": ({"licence": 3}, "licence: got 3, expected str or None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        hub.save_folder(nn.Linear(2, 2), tmp_path / "folder", **options)
    with pytest.raises(TypeError, match="^network: got int"):
        hub.save_folder(3, tmp_path / "folder")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "a b/c", "../x/y"])
def test_what_is_neither_a_folder_nor_a_repository_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^source: got .*, expected a folder that exists, or owner/name"):
        sparsekern.from_hub(name)


def test_a_repository_is_downloaded_and_uploaded_without_other_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            asked.append(token)

        def create_repo(self, name: str, **options: Any) -> None:
            asked.append((name, options))

        def upload_folder(self, **options: Any) -> Any:
            asked.append(options)
            return SimpleNamespace(commit_url="https://hub/commit/1")

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError, match="^folder: cannot read"):
        sparsekern.push_to_hub(tmp_path, "me/network")
    with pytest.raises(ValueError, match="^repository: got 'network', expected owner/name"):
        sparsekern.push_to_hub(saved, "network")
    assert not asked
    assert sparsekern.push_to_hub(saved, "me/network", token="t") == "https://hub/commit/1"
    assert asked[:2] == ["t", ("me/network", {"private": True, "exist_ok": True})]
    assert asked[2]["allow_patterns"] == list(hub.FILES) and asked[2]["repo_id"] == "me/network"
    network = sparsekern.from_hub("me/network", revision="v1")
    assert asked[3] == ("me/network", {"revision": "v1", "token": None, "allow_patterns": list(hub.FILES)})
    assert sparsekern.verify(network, sparsekern.load(saved / "model.safetensors"), image()) == 0


def test_the_library_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: hub.save_folder(nn.Linear(2, 2), tmp_path / "folder"),
        lambda: sparsekern.push_to_hub(tmp_path, "me/network"),
        lambda: sparsekern.from_hub("me/network"),
    ):
        with pytest.raises(ModuleNotFoundError, match=r'install "sparsekern\[hub\]"'):
            call()
