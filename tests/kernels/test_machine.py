"""The name of the CPU, which tells timings of two machines apart."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from sparsekern.kernels.native.machine import cpu_name

AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1

processor\t: 1
cpu family\t: 99
"""
ARM = """processor\t: 0
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


def test_two_generations_under_one_name_have_two_names(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    names = []
    for family in (25, 26):
        cpuinfo.write_text(AMD.format(family=family))
        names.append(cpu_name(cpuinfo))
    assert names == ["AMD EPYC, family 25, model 17", "AMD EPYC, family 26, model 17"]


def test_arm_processors_are_named_by_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(ARM)
    assert cpu_name(cpuinfo) == "aarch64, implementer 0x41, part 0xd40"
    assert cpu_name(tmp_path / "missing") == "aarch64"
