from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.method.lines import append, read

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
from pathlib import Path
from benchmarks.method.lines import append
number = 0
while True:
    append(Path(sys.argv[1]), {"number": number, "padding": "x" * 200_000})
    number += 1
"""


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read(path) == []
    for number in range(3):
        append(path, {"number": number})
    assert [record["number"] for record in read(path)] == [0, 1, 2]


def test_half_a_line_counts_for_nothing_and_is_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"number": 0}\n{"numb')
    assert read(path) == [{"number": 0}]
    append(path, {"number": 1})
    assert path.read_bytes() == b'{"number": 0}\n{"number": 1}\n'


def test_a_file_that_is_half_a_line_starts_anew(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"number"')
    append(path, {"number": 1})
    assert read(path) == [{"number": 1}]


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b""])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"number": 0}\n' + line + b'\n{"number": 2}\n')
    with pytest.raises(ValueError, match="lines.jsonl: line 2 is .*, expected a JSON object"):
        read(path)


def test_a_killed_writer_leaves_complete_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    for _ in range(3):
        before = len(read(path))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT)
        try:
            limit = time.monotonic() + 30
            while len(read(path)) < before + 2 and time.monotonic() < limit:
                time.sleep(0.002)
        finally:
            writer.kill()
            writer.wait()
        assert len(read(path)) >= before + 2
        append(path, {"number": -1})
        assert read(path)[-1] == {"number": -1} and path.read_bytes().endswith(b"\n")
