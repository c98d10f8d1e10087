from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sparsekern.report import runs as report


@pytest.mark.parametrize(
    ("value", "text"),
    [(31_037_633, "31.0 M"), (999, "999"), (1000, "1.00 k"), (54.7e9, "54.7 G"), (2e12, "2.00 T")],
)
def test_counts_have_three_digits_and_a_unit(value, text):
    assert report.count(value) == text


def rendered(columns):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report.comparison("title", columns))
    return {line.split("│")[1].strip(): line for line in capture.get().splitlines() if "│" in line}


def test_two_columns_are_compared_and_missing_figures_left_empty():
    dense = {"parameters": 2_000_000, "latency": 0.02, "dice": 0.9, "step_seconds": 0.1}
    pruned = {"parameters": 400_000, "latency": 0.03, "dice": 0.91, "step_seconds": 0.101, "miou": 0.8}
    rows = rendered({"dense": dense, "pruned": pruned})
    assert list(rows) == ["parameters", "CPU latency", "foreground Dice", "mIoU", "training step"]
    assert "5.0x less" in rows["parameters"] and "400 k" in rows["parameters"]
    assert "1.50x slower" in rows["CPU latency"] and "30.0 ms" in rows["CPU latency"]
    assert "+0.0100" in rows["foreground Dice"]
    assert "about equal" in rows["training step"]
    assert "0.8000" in rows["mIoU"] and "+" not in rows["mIoU"]


def test_one_column_stands_alone():
    rows = rendered({"dense": {"macs": 1e9}})
    assert list(rows) == ["MACs"] and rows["MACs"].count("│") == 3


def test_pictures_show_hits_misses_and_inventions_in_three_colours(tmp_path):
    truth = np.zeros((40, 40), np.uint8)
    truth[5:20, 5:20] = 1
    found = np.zeros((40, 40), np.int64)
    found[12:27, 5:20] = 1
    image = np.full((40, 40, 3), 90, np.uint8)
    path = tmp_path / "p.png"
    report.predictions(path, [image], [truth], {"dense": [found], "pruned": [found]})
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in (report.MISSED, report.INVENTED):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - rgb).max(1) <= 2).sum() > 1000
