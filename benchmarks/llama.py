"""The cost of training a small Llama: dense, shrinking to a share of its MACs, and in the final widths alone.

``python -m benchmarks.llama --seeds 3`` trains a Llama of 2.1 million parameters on bytes of Python's
standard library; every tenth file is held out. The arms train equally many steps on the same batches, each
in a process of its own:

* ``dense``: ``torch.optim.AdamW(fused=True)``;
* ``shrunk``: ``sparsekern.optim.AdamW`` and a Pruner with ``shrink=True``; MLPs, heads and the hidden width
  shrink under one budget of MACs;
* ``final``: the widths that ``shrunk`` ends with, from new weights, with torch's AdamW.

Wall and processor time cover the training from the making of the model to the last step, with tracing,
events and cuts; reading the text and the evaluation are left out. ``peak`` is the high-water mark of the
process's memory over the training, above what it held before; ``peak_last`` is that of the last quarter of
the steps. Linux only.

Every run is a line of ``benchmarks/results/llama.jsonl``. A command that is started again runs what is
missing there; the table is written to ``llama.txt``.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.method import lines
from benchmarks.peak_memory import _release, _status
from benchmarks.saved import RESULTS, save

ARMS = ("dense", "shrunk", "final")
_context = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setup:
    """Everything that the trainings of a study have in common.

    Attributes:
        steps: optimizer steps.
        batch: sequences of a step.
        length: bytes of a sequence.
        hidden: hidden width.
        layers: number of blocks.
        lr: the largest learning rate. It rises over a twentieth of the steps, then falls by a cosine.
        keep: share of the MACs that ``shrunk`` keeps.
        begin: share of the steps before the first event.
        finish: share of the steps at the last event.
        events: number of events.
        round_to: see ``Pruner``.
        threads: threads of torch.
    """

    steps: int = 500
    batch: int = 8
    length: int = 96
    hidden: int = 192
    layers: int = 5
    lr: float = 2e-3
    keep: float = 0.4
    begin: float = 0.05
    finish: float = 0.35
    events: int = 8
    round_to: int = 8
    threads: int = 1


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the standard library's sources for training and for evaluation, uint8."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = [], []
    for number, file in enumerate(files):
        parts[number % 10 == 9].append(file.read_bytes())
    train, held_out = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
    return train, held_out


def batches(text: np.ndarray, setup: Setup, seed: int) -> Iterator[Tensor]:
    """Random pieces of the text, int64 ``[batch, length]``, the same for the same seed."""
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(0, len(text) - setup.length, setup.batch)
        yield torch.from_numpy(np.stack([text[s : s + setup.length] for s in starts]).astype(np.int64))


def network(setup: Setup, seed: int) -> nn.Module:
    """A Llama over bytes with tied embeddings and two query heads of 32 for each key."""
    import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers

    # isort: split

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = setup.hidden // 32
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=setup.hidden,
        intermediate_size=setup.hidden * 8 // 3,
        num_hidden_layers=setup.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=setup.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    logits = model(tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, text: np.ndarray, setup: Setup) -> float:
    """Mean loss over 64 batches of held-out text."""
    model.eval()
    draw = batches(text, setup, 10**6)
    return statistics.fmean(float(loss_of(model, next(draw))) for _ in range(64))


def renewed(model: nn.Module) -> None:
    """Draw new weights as transformers does."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif type(module).__name__ == "LlamaRMSNorm":
            nn.init.ones_(module.weight)


def train(arm: str, seed: int, setup: Setup, plan: str | None) -> dict[str, Any]:
    """Train one arm in this process.

    Args:
        arm: of ``ARMS``.
        seed: of the weights and batches.
        setup: the study.
        plan: what ``shrunk`` keeps, as JSON, for ``final``.

    Returns:
        The figures of the run.
    """
    import sparsekern
    from sparsekern.compact import Plan

    torch.set_num_threads(setup.threads)
    text, held_out = corpus()
    draw = batches(text, setup, seed)
    _warm(setup)
    _reset_peak()
    before = _status("VmRSS")
    wall, processor = time.perf_counter(), time.process_time()
    model = network(setup, seed)
    whole = sum(p.numel() for p in model.parameters())
    if arm == "final":
        model = sparsekern.compact(model, Plan.from_json(plan or ""))
        renewed(model)
    model.train()
    pruner = None
    if arm == "shrunk":
        optimizer: torch.optim.Optimizer = sparsekern.optim.AdamW(model.parameters(), lr=setup.lr)
        pruner = sparsekern.Pruner(
            model,
            optimizer,
            next(batches(text, setup, seed)),
            keep=setup.keep,
            steps=setup.steps,
            warmup=setup.begin,
            finish=setup.finish,
            events=setup.events,
            round_to=setup.round_to,
            shrink=True,
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr, fused=True)
    losses: list[float] = []
    last = setup.steps * 3 // 4
    peak = 0
    for step in range(setup.steps):
        if step == last:
            peak = _status("VmHWM") - before
            _release()
            _reset_peak()
        for group in optimizer.param_groups:
            group["lr"] = setup.lr * schedule(step / setup.steps)
        loss = loss_of(model, next(draw))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak_last = _status("VmHWM") - before
    figures: dict[str, Any] = {
        "seconds": wall,
        "processor_seconds": processor,
        "peak": max(peak, peak_last),
        "peak_last": peak_last,
        "training_loss": statistics.fmean(losses[last:]),
    }
    if pruner is not None:
        figures |= {"macs_share": pruner.metrics()["macs_share"], "widths": pruner.widths()}
        figures["plan"] = pruner.plan().to_json()
        model = pruner.compact()
    parameters = sum(p.numel() for p in model.parameters())
    figures |= {"parameters": parameters, "parameters_share": parameters / whole}
    return figures | {"loss": held_out_loss(model, held_out, setup)}


def schedule(done: float) -> float:
    """The learning rate over the largest, by the share of the steps that are done."""
    return min(1.0, done / 0.05 + 0.01) * (0.55 + 0.45 * math.cos(math.pi * done))


def _warm(setup: Setup) -> None:
    """Run one step of a narrow model, so that all libraries are loaded before the time and memory begin."""
    model = network(Setup(hidden=64, layers=1, length=setup.length), 0)
    loss_of(model, torch.zeros(1, setup.length, dtype=torch.long)).backward()
    del model
    _release()


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _enter(arm: str, seed: int, setup: Setup, plan: str | None, results: Any) -> None:
    results.send(train(arm, seed, setup, plan))


def run(arm: str, seed: int, setup: Setup, plan: str | None) -> dict[str, Any]:
    """Train one arm in a process of its own.

    Raises:
        RuntimeError: the process has failed.
    """
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_enter, args=(arm, seed, setup, plan, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{arm}: the process ended with exit code {process.exitcode}") from None
    process.join()
    return found


def tabulate(records: list[dict[str, Any]]) -> Table:
    """One row for every run, with time and memory over those of ``dense`` of the same seed."""
    columns = ("seed", "arm", "loss", "wall s", "of dense", "processor s", "of dense", "peak MiB", "of dense")
    table = Table(*columns, "last peak of dense", "parameters", "MACs")
    dense = {r["seed"]: r for r in records if r["arm"] == "dense"}
    for r in sorted(records, key=lambda r: (r["seed"], ARMS.index(r["arm"]))):
        base = dense[r["seed"]]
        cells = [str(r["seed"]), r["arm"], f"{r['loss']:.4f}"]
        for name, scale in (("seconds", 1), ("processor_seconds", 1), ("peak", 2**20)):
            cells += [f"{r[name] / scale:.1f}", f"{r[name] / base[name]:.3f}"]
        cells += [f"{r['peak_last'] / base['peak_last']:.3f}", f"{r['parameters']:,}"]
        table.add_row(*cells, f"{r['macs_share']:.3f}" if "macs_share" in r else "")
    return table


def main(
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: int = Setup.steps,
    keep: Annotated[float, typer.Option(help="Share of the MACs that is kept.")] = Setup.keep,
    begin: float = Setup.begin,
    finish: float = Setup.finish,
    events: int = Setup.events,
    round_to: int = Setup.round_to,
    threads: int = Setup.threads,
    results: Annotated[Path, typer.Option(help="File of the runs.")] = RESULTS / "llama.jsonl",
) -> None:
    """Train every arm with every seed, and report loss, time and memory."""
    setup = Setup(
        steps=steps, keep=keep, begin=begin, finish=finish, events=events, round_to=round_to, threads=threads
    )
    key = {"setup": asdict(setup)}
    for seed in range(seeds):
        for arm in ARMS:
            own = [r for r in lines.read(results) if r["setup"] == key["setup"] and r["seed"] == seed]
            if any(r["arm"] == arm for r in own):
                continue
            plan = next((r["plan"] for r in own if r["arm"] == "shrunk"), None)
            figures = run(arm, seed, setup, plan)
            lines.append(results, {**key, "seed": seed, "arm": arm, **figures, "environment": environment()})
            typer.echo(f"seed {seed} {arm}: loss {figures['loss']:.4f}, {figures['seconds']:.1f} s")
    records = [r for r in lines.read(results) if r["setup"] == key["setup"] and r["seed"] < seeds]
    console = Console(width=150, record=True)
    console.print(f"{json.dumps(asdict(setup))}", highlight=False)
    console.print(tabulate(records))
    for arm in ARMS[1:]:
        shares = [share(records, arm, name) for name in ("seconds", "processor_seconds", "peak", "peak_last")]
        apart = statistics.fmean(r["loss"] for r in records if r["arm"] == arm)
        apart -= statistics.fmean(r["loss"] for r in records if r["arm"] == "dense")
        console.print(
            f"{arm}: wall time {shares[0]:.3f} of dense, processor time {shares[1]:.3f}, peak memory "
            f"{shares[2]:.3f}, in the last quarter {shares[3]:.3f}, held-out loss {apart:+.4f}",
            highlight=False,
        )
    console.print(environment())
    if results == RESULTS / "llama.jsonl":
        save("llama", console)


def share(records: list[dict[str, Any]], arm: str, name: str) -> float:
    """The mean over the seeds of a figure of an arm over that of ``dense``."""
    dense = {r["seed"]: r[name] for r in records if r["arm"] == "dense"}
    return statistics.fmean(r[name] / dense[r["seed"]] for r in records if r["arm"] == arm)


if __name__ == "__main__":
    typer.run(main)
