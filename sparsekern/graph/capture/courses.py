"""Programs that ask for the values of tensors, which a trace does not have.

``if not x.isfinite().all(): raise`` has one course that goes on: the trace answers so that it takes
that one. An answer that leads to other ops is a decision that no single trace can follow.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
# Two numbers that tensors are said to hold: a program that depends on them differs between the two.
NUMBERS = (3, 5)


class Site(NamedTuple):
    """A line of code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Formatted(TorchFunctionMode):
    """A tensor without data goes into a text, such as a line of a log, as the number 0."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__format__ and args[0].ndim == 0:
            return format(0.0, args[1])
        return func(*args, **(kwargs or {}))


class Answers:
    """Answers to questions for values that torch's tracer gives up on.

    given: what a condition on values is said to be, by the line that asks; False where it says
    nothing. asked: the lines that asked, in order. number: what tensors are said to hold.
    numbered: the line that last asked for a number. stuck: the line whose question has no answer.
    """

    def __init__(self) -> None:
        self.given: dict[Site, bool] = {}
        self.asked: dict[Site, None] = {}
        self.number = NUMBERS[0]
        self.numbered: Site | None = None
        self.stuck: Site | None = None

    def begin(self, given: dict[Site, bool], number: int = NUMBERS[0]) -> None:
        """Nothing has been asked; answers are ``given``."""
        self.given, self.number, self.numbered, self.stuck = given, number, None, None
        self.asked.clear()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Tracers ask here while the context lasts."""
        plain = ShapeEnv.evaluate_sym_node

        def evaluate(env: ShapeEnv, sym_node: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return plain(env, sym_node, *args, **kwargs)
            except GuardOnDataDependentSymNode:
                # What is made of a size that depends on data depends on it everywhere.
                if sym_node.expr.free_symbols & env.size_like or (site := _asking()) is None:
                    self.stuck = _asking()
                    raise
                return self._answer(site, sym_node.pytype)

        # Every export makes a shape environment of its own.
        with mock.patch.object(ShapeEnv, "evaluate_sym_node", evaluate), Formatted():
            yield

    def _answer(self, site: Site, kind: type) -> Any:
        if kind is bool:
            self.asked[site] = None
            return sympy.true if self.given.get(site, False) else sympy.false
        self.numbered = site
        return sympy.Integer(self.number) if kind is int else sympy.Float(self.number)


def followed(answers: Answers, given: dict[Site, bool], settled: bool, attempt: Callable[[], Any]) -> Any:
    """What ``attempt`` returns with answers with which the user's code goes on.

    Changes ``given`` until it does, unless it is ``settled``. Raises what ``attempt`` raises at last.
    """
    changed: set[Site] = set()
    while True:
        answers.begin(given)
        try:
            return attempt()
        except Exception as error:
            site = next((site for site in reversed(answers.asked) if site not in changed), None)
            if settled or site is None or not raised_by_user(error):
                raise
            changed.add(site)
            given[site] = not given.get(site, False)


def fork(answers: Answers, given: dict[Site, bool], attempt: Callable[[], fx.GraphModule]) -> Site | None:
    """A line whose answer changes the program that ``attempt`` traces, None where there is none.

    An answer that makes the user's code raise is no other course.
    """
    answers.begin(given)
    whole = _described(attempt())
    asked, numbered = list(answers.asked), answers.numbered
    variants = [(site, {**given, site: not given.get(site, False)}, NUMBERS[0]) for site in asked]
    variants += [(numbered, given, NUMBERS[1])] if numbered else []
    for site, other, number in variants:
        answers.begin(other, number)
        try:
            if _described(attempt()) != whole:
                return site
        except Exception as error:
            if not raised_by_user(error):
                return site
    answers.begin(given)
    return None


def raised_by_user(error: BaseException) -> bool:
    """Whether the user's code raised it, rather than something that it called."""
    origin = error.__cause__ or error
    frames = traceback.extract_tb(origin.__traceback__)
    return isinstance(origin, AssertionError) or bool(frames and _is_users(frames[-1].filename))


def line_of(error: BaseException) -> Site | None:
    """The last line of the user's code that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)]
    # What called the trace is the user's, too.
    inside = [i for i, frame in enumerate(frames) if frame.filename.startswith(_OURS)]
    own = own if not inside else [frame for frame in frames[inside[0] :] if _is_users(frame.filename)]
    return Site(own[-1].filename, own[-1].lineno or 0) if own else None


def _asking() -> Site | None:
    """The line of the model that asks; of torch's own layer where the user's code is not between."""
    layer: Site | None = None
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and file != __file__:
            return layer
        if _is_users(file):
            return Site(file, frame.f_lineno)
        if layer is None and file.startswith(f"{_TORCH}/nn/modules/") and not file.endswith("/module.py"):
            layer = Site(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return layer


def _is_users(file: str) -> bool:
    return not file.startswith((_TORCH, _OURS, "<"))


def steps(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The ops in the order in which they run, those of inner regions after the op that enters."""
    for node in module.graph.nodes:
        if node.op in ("call_function", "output"):
            yield node
        elif node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            yield from steps(getattr(module, str(node.target)))


def _described(module: fx.GraphModule) -> list[Any]:
    """The ops with what they read and how large it is; not by name, as an unused op leaves a gap."""
    numbers: dict[fx.Node, int] = {}
    found: list[Any] = []
    for node in steps(module):
        sources = [numbers.setdefault(source, len(numbers)) for source in node.all_input_nodes]
        made = [t.shape for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        sizes = [[size if isinstance(size, int) else -1 for size in shape] for shape in made]
        found.append((str(node.target), sources, sizes))
        numbers[node] = len(numbers)
    return found
