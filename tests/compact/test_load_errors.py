from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compact.networks import KEPT, Chain, chain, chain_plan, plan_for, unchanged
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekern.compact import Plan, load, save, store


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def rewrite(path: Path, **metadata: str) -> None:
    """The same file with other metadata and a valid checksum: a deliberate forgery."""
    tensors, old = load_file(path), header(path)["__metadata__"]
    new = {**old, **metadata}
    save_file(tensors, path, {**new, "sha256": store._digest(new, tensors)})


def refused(path: Path, message: str, kind: type[Exception] = ValueError) -> None:
    fresh = Chain()
    with unchanged(fresh), pytest.raises(kind, match=f"path: .*{path.name}.*{message}"):
        load(fresh, path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, rf"is truncated: {int(len(data) * share)} bytes, expected ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"PK\x03\x04 this is an archive of torch.save",
        (5).to_bytes(8, "little") + b"hello",
        (4).to_bytes(8, "little") + b"{'a}",
        (10).to_bytes(8, "little") + b'{"a": [1]}',
        (12).to_bytes(8, "little") + b'{"a": "text"' + b"}",
    ],
)
def test_what_is_not_safetensors_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused(path, "is not a safetensors file")


def test_a_pickle_is_not_opened(path: Path) -> None:
    torch.save(chain(), path)
    refused(path, "is not a safetensors file")


def test_other_peoples_safetensors_are_refused(path: Path) -> None:
    save_file(Chain().state_dict(), path)
    refused(path, "was not written by sparsekern")
    save_file(Chain().state_dict(), path, {"format": "pt"})
    refused(path, "was not written by sparsekern")


def test_bytes_after_the_tensors_are_refused(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")
    refused(path, "is damaged")


@pytest.mark.parametrize("where", [-1, -1000])
def test_a_changed_value_is_noticed(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    refused(path, "was changed after it was saved, expected one whose checksum is right")


def test_a_changed_plan_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"0,3-5,7', b'"1,3-5,7').replace(b"0,3-5,7", b"1,3-5,7"))
    assert path.read_bytes() != data
    refused(path, "expected one whose checksum is right")


def test_a_changed_name_is_noticed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"act.weight":', b'"art.weight":'))
    refused(path, "expected one whose checksum is right")


def test_a_newer_version_is_refused(path: Path) -> None:
    rewrite(path, version="2")
    refused(path, "has format version 2, expected 1")


def test_an_inconsistent_plan_is_refused(path: Path) -> None:
    rewrite(path, plan="{}")
    refused(path, "holds a Chain, expected a file that fits this Chain: text: got JSON that is not a plan")
    rewrite(path, plan=chain_plan(Chain(), (0, 1)).to_json())
    refused(path, r"'stem.weight' is \[5, 3, 3, 3\] instead of \[2, 3, 3, 3\]")
    whole = plan_for(Chain(), {"norm.weight": {0: KEPT}})
    rewrite(path, plan=whole.to_json())
    refused(path, r"'stem.weight' is \[5, 3, 3, 3\] instead of \[8, 3, 3, 3\]")
    rewrite(path, plan=Plan({}).to_json(), tied="[]")
    refused(path, "expected a file that fits this Chain")


def test_a_plan_whose_layers_do_not_fit_each_other_is_refused(tmp_path: Path) -> None:
    tensors = chain().state_dict()
    tensors["norm.weight"] = tensors["norm.weight"][list(KEPT)].clone()
    plan = plan_for(Chain(), {"norm.weight": {0: KEPT}})
    path = tmp_path / "model.safetensors"
    save(chain(), path)
    metadata = {**header(path)["__metadata__"], "plan": plan.to_json()}
    save_file(tensors, path, {**metadata, "sha256": store._digest(metadata, tensors)})
    fresh = Chain()
    with unchanged(fresh), pytest.raises(ValueError, match=r"plan: norm.* keeps . of 8, expected"):
        load(fresh, path)


def test_another_network_is_refused(path: Path) -> None:
    fresh = nn.Sequential(nn.Linear(3, 3))
    with (
        unchanged(fresh),
        pytest.raises(
            ValueError,
            match=r"holds a Chain, expected a file that fits this Sequential: plan: got a plan for a",
        ),
    ):
        load(fresh, path)
    save(fresh, path)
    refused(path, r"holds a Sequential, .* this Chain: 'stem.weight' is missing, .* more")
    save(nn.Sequential(chain()), path)
    refused(path, "'stem.weight' is missing")
    wider = Chain()
    wider.head = nn.Linear(6, 5)
    save(wider, path)
    refused(path, r"'head.weight' is \[5, 6\] instead of \[4, 6\]")
    save(wider.to(torch.float64), path)
    more = Chain()
    more.extra = nn.Linear(2, 2)
    save(more, path)
    refused(path, "'extra.bias' is not expected, 'extra.weight' is not expected")
    whole = chain()
    whole.head.bias = nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)
    save(whole, path)
    refused(path, "'head.bias' is torch.int32 instead of torch.float32")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "No such file", FileNotFoundError)
    (tmp_path / "directory").mkdir()
    refused(tmp_path / "directory", "directory", IsADirectoryError)
