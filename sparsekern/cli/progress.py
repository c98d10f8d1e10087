"""Progress of a training: a bar in a terminal, else a line now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsekern.cli.app import console
from sparsekern.recipes.metrics import Scores
from sparsekern.recipes.train import Step

# Number of lines of a training, not counting evaluations, and longest time without a line in seconds.
LINES, SILENCE = 20, 30.0


@contextmanager
def progress(name: str, steps: int) -> Iterator[Callable[[Step], None]]:
    """Show the progress of the training `name` with `steps` steps.

    Yields:
        The callback for each step.
    """
    if console.is_terminal and not console.quiet:
        with _bar(name, steps) as on_step:
            yield on_step
    else:
        yield _Lines(name, steps)


@contextmanager
def _bar(name: str, steps: int) -> Iterator[Callable[[Step], None]]:
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  MACs {task.fields[share]:4.0%}"),
        TextColumn("{task.fields[dice]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as shown:
        task = shown.add_task(name, total=steps, loss=float("nan"), share=1.0, dice="")

        def on_step(step: Step) -> None:
            dice = "" if step.scores is None else f"Dice {step.scores.dice:.3f}"
            shown.update(task, completed=step.step, loss=step.loss, share=step.macs_share, dice=dice)

        yield on_step


class _Lines:
    """Prints a line at each twentieth of the steps, at each new score, and after 30 s without a line."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._begin = self._last = perf_counter()
        self._scores: Scores | None = None

    def __call__(self, step: Step) -> None:
        now = perf_counter()
        done, before = (number * LINES // self._steps for number in (step.step, step.step - 1))
        if done == before and step.scores is self._scores and now - self._last < SILENCE:
            return
        dice = "" if step.scores is None else f"  Dice {step.scores.dice:.3f}"
        console.print(
            f"{self._name}: step {step.step}/{self._steps}  loss {step.loss:.4f}  "
            f"MACs {step.macs_share:.0%}{dice}  {now - self._begin:.1f} s",
            soft_wrap=True,
        )
        self._last, self._scores = now, step.scores
