"""The code in the README and on every page of the site runs unchanged, and the README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prune.networks import Plain, batch
from torch import nn

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SITE = sorted((ROOT / "docs").rglob("*.md")) + [
    ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "csrc/README.md")
]
PAGES = [page for page in SITE if re.search(r"^```python", page.read_text(), re.M)]
# Pages with whole programs, which assume no names.
STANDALONE = {"tutorial"}
STEPS = 30

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def scope_of_a_reader() -> dict[str, Any]:
    """The names that the pages assume."""
    torch.manual_seed(0)
    return {
        "torch": torch,
        "model": Plain(),
        "make_model": Plain,
        "criterion": nn.CrossEntropyLoss(),
        "example_inputs": batch(0),
        "loader": [(batch(step), torch.arange(4) % 4) for step in range(STEPS)],
        "total_steps": STEPS,
        "x": batch(0),
        "y": torch.arange(4) % 4,
        "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD(Plain().parameters()), 1),
    }


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(page: Path, scope: dict[str, Any]) -> None:
    for number, block in enumerate(blocks_of(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)


def test_the_example_of_the_readme(folder: Path) -> None:
    scope = scope_of_a_reader()
    assert len(blocks_of(README)) == 1
    run(README, scope)
    assert scope["pruner"].metrics()["macs_share"] <= 0.2
    assert scope["small"].stem[0].out_channels < 16


def test_the_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.split()) <= 600
    for line in text.splitlines():
        if line.startswith("|"):
            assert all(len(cell.split()) <= 20 for cell in line.strip("|").split("|")), line


def test_no_block_of_code_escapes() -> None:
    """Python is written as ```python at the beginning of a line; other blocks hold text or commands."""
    for page in [README, *SITE]:
        fences = re.findall(r"^[ >]*(?:```|~~~).*", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"```", "```python", "```text"}, page
        blocks = re.split(r"^```.*\n", page.read_text(), flags=re.MULTILINE)[1::2]
        assert len([block for block in blocks if "import sparsekern" in block]) <= len(blocks_of(page)), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page(page: Path, folder: Path) -> None:
    scope = {} if page.stem in STANDALONE else scope_of_a_reader()
    if page.stem == "lightning":
        pytest.importorskip("lightning")
        # Pages may omit how a loader makes batches; Lightning expects a DataLoader.
        scope["loader"] = torch.utils.data.DataLoader(scope["loader"], batch_size=None)
    if page.stem == "hugging-face":
        import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers

        pytest.importorskip("transformers")
        scope["loader"] = [(nn.functional.interpolate(x, scale_factor=2), y) for x, y in scope["loader"][:6]]
        scope["example_inputs"] = scope["loader"][0][0]
    if page.stem == "distributed":
        with one_process(folder):
            run(page, scope)
    else:
        run(page, scope)
    if page.stem in CHECKS:
        CHECKS[page.stem](scope)


def _index(scope: dict[str, Any]) -> None:
    assert blocks_of(ROOT / "docs" / "index.md") and scope["pruner"].finished
    assert scope["pruner"].metrics()["macs_share"] <= 0.2


def _tutorial(scope: dict[str, Any]) -> None:
    """The network has learned, meets the budget, and ONNX Runtime gives its outputs."""
    pytest.importorskip("onnxruntime")
    assert scope["pruner"].finished and scope["pruner"].metrics()["macs_share"] <= 0.2
    assert scope["accuracy"] > 0.9 and scope["difference"] < 1e-5
    assert scope["small"][0].out_channels < 16
    assert scope["outputs"].shape == (1, 4) and Path("small.onnx").exists()


def _own_loop(scope: dict[str, Any]) -> None:
    assert scope["difference"] < 1e-5
    assert Path("small.safetensors").exists() and Path("run.pt").exists()
    assert scope["small"].stem[0].out_channels < 16


def _checkpoints(scope: dict[str, Any]) -> None:
    assert scope["extra"] == {"scheduler": scope["scheduler"].state_dict()}
    assert scope["network"].stem[0].out_channels < 16 and scope["best"] < float("inf")


def _trained_network(scope: dict[str, Any]) -> None:
    assert scope["network"].stem[0].out_channels < 16 and scope["plan"].tensors
    assert 0 < scope["milliseconds"] < 1e3
    assert len(list(Path("cache").iterdir())) == 1


def _lightning(scope: dict[str, Any]) -> None:
    assert scope["pruning"].pruner.finished and scope["small"].network.stem[0].out_channels < 16


def _hugging_face(scope: dict[str, Any]) -> None:
    whole = sum(p.numel() for p in scope["trainer"].model.parameters())
    assert scope["pruning"].pruner.finished and sum(p.numel() for p in scope["small"].parameters()) < whole


def _distributed(scope: dict[str, Any]) -> None:
    assert scope["pruner"].finished and scope["small"].stem[0].out_channels < 16


def _averages(scope: dict[str, Any]) -> None:
    assert scope["averaged"].stem[0].out_channels == scope["ema"].module.stem[0].out_channels < 16
    assert scope["pruner"].finished


def _migrating(scope: dict[str, Any]) -> None:
    assert scope["small"].stem[0].out_channels == 13


CHECKS = {
    "index": _index,
    "tutorial": _tutorial,
    "own-loop": _own_loop,
    "checkpoints": _checkpoints,
    "trained-network": _trained_network,
    "lightning": _lightning,
    "hugging-face": _hugging_face,
    "distributed": _distributed,
    "amp-ema-accumulation": _averages,
    "migrating": _migrating,
}
