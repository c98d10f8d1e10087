"""The command that times stored networks in every runtime: latency."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from sparsekern.cli.app import Threads, app, console, set_quiet, set_threads


@app.command()
def latency(
    files: Annotated[
        list[Path], typer.Argument(help="model.safetensors of trainings, or directories with one")
    ],
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 256,
    batch: Annotated[list[int], typer.Option(help="Batch size; may be repeated.")] = [1, 8],  # noqa: B006
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="torch, compile, onnxruntime, openvino; may be repeated. Default: all installed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the seconds as JSON.")] = False,
    threads: Threads = 0,
) -> None:
    """Time networks beside their dense ones in every runtime: norms folded in torch, as written elsewhere."""
    from sparsekern.deploy import deploy
    from sparsekern.deploy.speed import speeds
    from sparsekern.recipes.errors import InputError
    from sparsekern.recipes.timed import dense_and_compact
    from sparsekern.runtimes import check_runtime, installed, version

    set_quiet(False)
    set_threads(threads)
    if size < 1 or min(batch) < 1:
        raise InputError(f"--size, --batch: got {size} and {batch}, expected whole numbers >= 1")
    chosen = [check_runtime(name, "--runtime") for name in runtime] if runtime else installed()
    found = []
    errors = Console(stderr=True)
    for path in files:
        file = path / "model.safetensors" if path.is_dir() else path
        networks, image = dense_and_compact(file, size)
        folded = {name: deploy(network, image) for name, network in networks.items()}
        measured = track(
            speeds(folded, image, chosen, batch),
            description=escape(str(path)),
            total=len(chosen) * len(batch),
            console=errors,
            transient=True,
            disable=not errors.is_terminal,
        )
        for speed in measured:
            entry: dict[str, Any] = {
                "file": str(path),
                "runtime": speed.runtime,
                "version": version(speed.runtime),
            }
            entry |= {"batch": speed.batch, "threads": torch.get_num_threads(), "size": size}
            found.append(entry | dict(speed.seconds) | ({"problem": speed.problem} if speed.problem else {}))
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    console.print(_table(found, size))


def _table(found: list[dict[str, Any]], size: int) -> Table:
    threads = torch.get_num_threads()
    title = f"Milliseconds per pass, images {size}x{size}, {threads} thread{'s' if threads > 1 else ''}"
    table = Table(title=title, title_justify="left")
    for name in ("file", "runtime", "batch", "dense", "compact", "faster"):
        table.add_column(name, justify="left" if name in ("file", "runtime") else "right")
    for entry in found:
        cells = [entry["file"], f"{entry['runtime']} {entry['version']}", str(entry["batch"])]
        if "problem" in entry:
            table.add_row(*cells, "-", "-", entry["problem"][:60])
            continue
        dense, compact = entry["dense"], entry["compact"]
        table.add_row(*cells, f"{1e3 * dense:.2f}", f"{1e3 * compact:.2f}", f"{dense / compact:.2f}x")
    return table
