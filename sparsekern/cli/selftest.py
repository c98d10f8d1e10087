"""The command ``selftest``: every problem of the self-check on one backend, and a file for a report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sparsekern import info
from sparsekern.cli.app import app, console
from sparsekern.files.atomic import replacing, target
from sparsekern.kernels import backends
from sparsekern.kernels.selfcheck import cases
from sparsekern.kernels.selfcheck.run import Result, results
from sparsekern.kernels.selfcheck.stored import Outcome, Store

FORMAT, VERSION = "sparsekern.selftest", 1

# Failures that are printed; the file has all of them.
_SHOWN = 10


@dataclass(frozen=True)
class _Report:
    """What the problems showed, and on what."""

    backend: str
    device: torch.device
    results: list[Result]
    seconds: float

    @property
    def failures(self) -> list[str]:
        """One text for each problem that was not solved as by the reference."""
        return [result.failure for result in self.results if result.failure is not None]

    def plain(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "backend": self.backend,
            "device": str(self.device),
            "settings": Store(self.backend, self.device).settings,
            "seconds": round(self.seconds, 1),
            "failures": len(self.failures),
            "environment": info.collect(),
            "problems": [result.plain() for result in self.results],
        }


@app.command()
def selftest(
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda, cuda:1; a GPU if there is one.")
    ] = "",
    backend: Annotated[str, typer.Option(help="cuda, triton or cpu; the preferred one that works.")] = "",
    out: Annotated[Path, typer.Option(help="File to write, to attach to a report.")] = Path("selftest.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Only the problems of the first use.")] = False,
) -> int:
    """Compare a backend with plain torch on all small problems; exit code 1 if it differs."""
    where = _device(device)
    name = _backend(backend, where)
    target(out, "--out")
    report = _run(name, where, quick=quick)
    with replacing(out, "--out") as temporary:
        temporary.write_text(json.dumps(report.plain(), indent=1) + "\n")
    failures = report.failures
    if backends.is_checked(name, where):
        Store(name, where).write(Outcome(failures[0] if failures else None))
        backends.reset()
    for failure in failures[:_SHOWN]:
        console.print(failure, soft_wrap=True)
    if len(failures) > _SHOWN:
        console.print(f"... and {len(failures) - _SHOWN} more")
    solved = (
        f"{len(report.results) - len(failures)} of {len(report.results)} problems solved as by the reference"
    )
    console.print(f"{name} on {where}: {solved}, in {report.seconds:.0f} s; {out}", soft_wrap=True)
    return 1 if failures else 0


def _device(text: str) -> torch.device:
    """The device of that name; the current GPU, else the CPU, for an empty one.

    Raises:
        ValueError: there is no such device.
    """
    if not text:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"--device: got {text!r}, expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {text!r}, expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(f"--device: got {text!r}, expected one of the {count} GPUs that torch finds")
    return torch.device("cuda", index)


def _backend(name: str, device: torch.device) -> str:
    """The backend of that name; the preferred one that works, for an empty one.

    Raises:
        ValueError: there is no such backend, or it does not work on the device.
    """
    names = backends.compiled(device)
    if name:
        if name not in names:
            raise ValueError(f"--backend: got {name!r} for {device}, expected one of {', '.join(names)}")
        names = (name,)
    reasons = {candidate: backends.why_not(candidate, device) for candidate in names}
    found = next((candidate for candidate, reason in reasons.items() if reason is None), None)
    if found is None:
        texts = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise ValueError(f"--backend: got no backend that works on {device} ({texts}), expected one to test")
    return found


def _run(name: str, device: torch.device, *, quick: bool) -> _Report:
    """Run the problems, with a progress bar on stderr."""
    chosen = list(cases.first_use() if quick else cases.every())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    found, start = [], time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{name} on {device}", total=len(chosen))
        for result in results(backends.module(name), device, chosen):
            found.append(result)
            progress.advance(task)
    return _Report(name, device, found, time.monotonic() - start)
