from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compact.networks import KEPT, Chain, chain, chain_plan, mask_chain, plan_for, unchanged
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekern.compact import Plan, compact, load, plan_of, save, store, verify

INPUT = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_compact_model_comes_back_bit_by_bit(path: Path) -> None:
    model = mask_chain(chain())
    small = compact(model, chain_plan(model))
    fresh = Chain()
    with unchanged(fresh):
        loaded = load(fresh, path)
    assert type(loaded) is Chain
    assert verify(small, loaded, INPUT) == 0
    assert verify(model, loaded, INPUT) < 1e-14
    assert plan_of(loaded) == chain_plan(model)
    assert loaded.depth.groups == 5
    assert all(p.requires_grad and p.dtype == torch.float64 for p in loaded.parameters())


def test_other_readers_get_the_tensors(path: Path) -> None:
    small = compact(chain(), chain_plan(chain()))
    small.load_state_dict(load_file(path))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["class"] == "Chain"
    assert Plan.from_json(metadata["plan"]) == chain_plan(chain())


def test_a_dense_model_is_saved_without_a_plan(tmp_path: Path) -> None:
    model = chain()
    save(model, tmp_path / "dense")
    loaded = load(Chain(), tmp_path / "dense")
    assert verify(model, loaded, INPUT) == 0
    assert plan_of(loaded).removes_nothing


def test_the_plan_of_a_twice_compacted_model_is_for_the_full_one(tmp_path: Path) -> None:
    model = mask_chain(chain(), (0, 4))
    first = compact(model, chain_plan(model))
    save(compact(first, chain_plan(first, (0, 2))), tmp_path / "model")
    assert verify(model, load(Chain(), tmp_path / "model"), INPUT) < 1e-14


def test_a_model_that_is_compact_already_takes_the_values(path: Path) -> None:
    small = compact(Chain(), chain_plan(Chain()))
    loaded = load(small, path)
    assert verify(mask_chain(chain()), loaded, INPUT) < 1e-14
    assert plan_of(loaded) == plan_of(small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = compact(chain(), chain_plan(chain())).to(dtype)
    save(model, tmp_path / "model")
    loaded = load(Chain(), tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == tensor.dtype


def test_memory_format_is_that_of_the_module(path: Path) -> None:
    loaded = load(Chain().to(memory_format=torch.channels_last), path)
    assert loaded.up.weight.is_contiguous(memory_format=torch.channels_last)
    assert verify(mask_chain(chain()), loaded, INPUT) < 1e-14


def test_channels_last_is_saved_and_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = chain().to(memory_format=torch.channels_last)
    save(model, tmp_path / "model")
    fresh = Chain()
    fresh.head.requires_grad_(False)
    loaded = load(fresh, tmp_path / "model")
    assert verify(model, loaded, INPUT) < 1e-14
    assert not loaded.head.weight.requires_grad


def test_a_factory_on_the_meta_device_takes_no_memory(path: Path) -> None:
    with torch.device("meta"):
        fresh = Chain()
    assert verify(mask_chain(chain()), load(fresh, path), INPUT) < 1e-14


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = chain()
    save(torch.compile(model, backend="eager"), tmp_path / "model")
    assert verify(model, load(Chain(), tmp_path / "model"), INPUT) == 0


class Shared(nn.Module):
    """A weight in two layers, a buffer that is part of another, one that is not saved."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(3, 8, bias=False)
        self.two = nn.Linear(3, 8, bias=False)
        if tie:
            self.two.weight = self.one.weight
        self.register_buffer("table", torch.randn(16))
        self.register_buffer("part", self.table[8:])
        self.register_buffer("same", self.table.view(4, 4))
        self.register_buffer("scale", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x) + self.two(x)) * self.part * self.scale + self.table.sum()


def shared_plan(model: nn.Module) -> Plan:
    return plan_for(model, {name: {0: KEPT} for name in ("one.weight", "part", "scale")})


def test_tied_and_overlapping_tensors_are_saved_once_each(tmp_path: Path) -> None:
    small = compact(Shared(), shared_plan(Shared()))
    save(small, tmp_path / "model")
    assert load_file(tmp_path / "model").keys() == {"one.weight", "table", "part", "same"}
    loaded = load(Shared(), tmp_path / "model")
    assert loaded.one.weight is loaded.two.weight
    assert loaded.scale.tolist() == list(KEPT)
    assert verify(small, loaded, torch.randn(2, 3)) == 0


def test_what_was_tied_fills_what_is_not(tmp_path: Path) -> None:
    model = Shared()
    save(model, tmp_path / "model")
    loaded = load(Shared(tie=False), tmp_path / "model")
    assert loaded.one.weight is not loaded.two.weight
    assert verify(model, loaded, torch.randn(2, 3)) == 0


def test_what_was_not_tied_cannot_fill_what_is(tmp_path: Path) -> None:
    save(Shared(tie=False), tmp_path / "model")
    with pytest.raises(ValueError, match=r"'two.weight' differs from 'one.weight'"):
        load(Shared(), tmp_path / "model")


def test_saving_follows_links_and_replaces(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path.name)
    model = chain()
    save(model, link)
    assert link.is_symlink()
    assert verify(model, load(Chain(), path), INPUT) == 0
    assert sorted(path.parent.iterdir()) == [link, path]


def test_the_umask_holds(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(chain(), tmp_path / "model")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("missing/model", FileNotFoundError, "missing' is not a directory"),
        ("file/model", FileNotFoundError, "file' is not a directory"),
        (".", IsADirectoryError, "is a directory, expected a file name"),
        ("pipe", OSError, "pipe' is not a regular file"),
        ("n" * 300, OSError, r"cannot write .*: .*name too long"),
        ("/proc/model", OSError, "cannot write '/proc/model'"),
    ],
)
def test_an_unwritable_path_is_named(tmp_path: Path, name: str, kind: type[Exception], message: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(kind, match=f"(?i)path: .*{message}"):
        save(nn.Linear(2, 2), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"path: cannot write .*model.safetensors"):
            save(nn.Linear(100, 100), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 1}


def with_buffer(buffer: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("odd", buffer)
    return module


@pytest.mark.parametrize(
    ("module", "kind", "message"),
    [
        ({"weight": 1}, TypeError, "model: got dict, expected an nn.Module"),
        (nn.Sequential(Extra(2, 2)), ValueError, "module: got extra state of '0'"),
        (nn.Linear(2, 2, device="meta"), ValueError, "module: got 'weight' on the meta device"),
        (with_buffer(torch.zeros(2, dtype=torch.complex128)), ValueError, "got odd of dtype .*complex128"),
        (with_buffer(torch.eye(2).to_sparse()), ValueError, "got 'odd' of layout torch.sparse_coo"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    tmp_path: Path, module: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        save(module, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_buffers_on_meta_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    save(Shared(), tmp_path / "model")
    with torch.device("meta"):
        fresh = Shared()
    with pytest.raises(ValueError, match="module: got the buffer 'scale' on the meta device"):
        load(fresh, tmp_path / "model")


# Children are forked and killed while they overwrite the file again and again.
KILLED = """
import os, random, signal, sys, time
import torch
from torch import nn
from sparsekern.compact import load, save

path = sys.argv[1]
models = [nn.Linear(600, 600) for _ in range(2)]
for number, model in enumerate(models):
    nn.init.constant_(model.weight, number)
save(models[0], path)
random.seed(0)
attempt, folder = 0, os.path.dirname(path)
# Until some child was caught in the middle: its unfinished file is left.
while attempt < 12 or len(os.listdir(folder)) == 1:
    attempt += 1
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                save(model, path)
    time.sleep(random.uniform(0.002, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    weight = load(nn.Linear(600, 600), path).weight
    assert (weight == weight[0, 0]).all(), attempt
"""


def test_being_killed_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "model.safetensors")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(store.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
