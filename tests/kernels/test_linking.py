"""The compiled core links libraries of the system alone, so that one wheel works with every torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekern

CORES = sorted(Path(sparsekern.__file__).parent.glob("kernels/native/_C*.so"))
# Those that every manylinux platform has. libtorch is none of them: kernels take addresses of tensors.
ALLOWED = r"(libc|libm|libgcc_s|libstdc\+\+|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+"


@pytest.mark.skipif(sys.platform != "linux", reason="names of the libraries are those of Linux")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.skipif(not CORES, reason="there is no compiled core")
def test_the_core_links_libraries_of_the_system_alone() -> None:
    for core in CORES:
        done = subprocess.run(["readelf", "-d", str(core)], capture_output=True, text=True, check=True)
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)
        assert "libc.so.6" in needed
        assert [name for name in needed if not re.fullmatch(ALLOWED, name)] == []
        assert "RUNPATH" not in done.stdout and "RPATH" not in done.stdout
