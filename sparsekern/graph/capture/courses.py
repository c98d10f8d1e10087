"""Programs that ask for the values of tensors, which a trace does not have.

``if not x.isfinite().all(): raise`` has one course that continues. The trace gives the answer that
takes this course. If another answer leads to other ops, no single trace can follow the program.
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
# Code of these files runs between an op of the user's code and the question that it leads to.
_BETWEEN = frozenset({__file__, str(Path(__file__).with_name("record.py"))})
# More courses are not followed.
_MOST_COURSES = 8
# Two numbers given as the values of tensors. A program that depends on them differs between the two.
NUMBERS = (3, 5)


class Site(NamedTuple):
    """A line of code.

    Attributes:
        file: path of the source file.
        line: line number, from 1; 0 if it is not known.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


# The answers to a condition, taken in turn each time that its line asks.
Pattern = tuple[bool, ...]
Given = dict[Site, Pattern]


class Formatted(TorchFunctionMode):
    """Formats a scalar tensor without data as the number 0, such as in a line of a log."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__format__ and args[0].ndim == 0:
            return format(0.0, args[1])
        return func(*args, **(kwargs or {}))


class Answers:
    """Answers to questions for values that torch's tracer does not know.

    Attributes:
        given: the answers to a condition on values, by the line that asks. The default is False.
        asked: the lines that asked for a condition, in order, and how often each did.
        number: the answer to a question for a number.
        numbered: the line that last asked for a number; None if none did.
        stuck: the line whose question has no answer; None if there is none.
    """

    def __init__(self) -> None:
        self.given: Given = {}
        self.asked: dict[Site, int] = {}
        self.number = NUMBERS[0]
        self.numbered: Site | None = None
        self.stuck: Site | None = None

    def begin(self, given: Given, number: int = NUMBERS[0]) -> None:
        """Forget all questions and set the answers.

        Args:
            given: the answers to a condition, by the line that asks.
            number: the answer to a question for a number.
        """
        self.given, self.number, self.numbered, self.stuck = given, number, None, None
        self.asked.clear()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Tracers use these answers while the context lasts."""
        plain = ShapeEnv.evaluate_sym_node

        def evaluate(env: ShapeEnv, sym_node: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return plain(env, sym_node, *args, **kwargs)
            except GuardOnDataDependentSymNode:
                # A value computed from a data-dependent size has no fixed answer.
                if sym_node.expr.free_symbols & env.size_like or (site := _asking()) is None:
                    self.stuck = _asking()
                    raise
                return self._answer(site, sym_node.pytype)

        # Every export makes its own shape environment, so the patch is on the class.
        with mock.patch.object(ShapeEnv, "evaluate_sym_node", evaluate), Formatted():
            yield

    def _answer(self, site: Site, kind: type) -> Any:
        if kind is bool:
            pattern, times = self.given.get(site, (False,)), self.asked.get(site, 0)
            self.asked[site] = times + 1
            return sympy.true if pattern[times % len(pattern)] else sympy.false
        self.numbered = site
        return sympy.Integer(self.number) if kind is int else sympy.Float(self.number)


def followed(answers: Answers, given: Given, settled: bool, attempt: Callable[[], Any]) -> Any:
    """Call ``attempt`` with answers that let the user's code continue.

    Args:
        answers: the answers in use.
        given: answers by line. They are changed until the user's code continues.
        settled: whether ``given`` must not change.
        attempt: traces or runs the program.

    Returns:
        The result of ``attempt``.

    Raises:
        Exception: the last error of ``attempt``, if no change of answers avoids it.
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
            given[site] = _opposite(given, site)


def courses(
    answers: Answers, given: Given, first: fx.GraphModule, attempt: Callable[[], fx.GraphModule]
) -> list[Given]:
    """Find all courses of a program that decides by the values in tensors.

    A line that asks several times, as in a module that is used again, is answered alike, and in two
    alternating ways. So every two decisions that follow each other are met in all combinations. An answer
    that makes the user's code raise leads to no course.

    Args:
        answers: the answers in use, with what was asked for ``first``.
        given: the answers with which the program continues, by line.
        first: the program that these answers led to.
        attempt: traces the program.

    Returns:
        The answers of every course with a program of its own; ``given`` comes first.

    Raises:
        Forked: a number from a tensor changes the program, a course cannot be traced, or there are too
            many.
    """
    programs = [_described(first)]
    found, tried = [given], [given]
    asked = {0: dict(answers.asked)}
    if answers.numbered is not None:
        _check_number(answers, given, programs[0], attempt)
    for number, base in enumerate(found):
        for site, times in asked[number].items():
            for pattern in _patterns(base, site, times):
                other = {**base, site: pattern}
                if other in tried:
                    continue
                tried.append(other)
                answers.begin(other)
                try:
                    program = _described(attempt())
                except Exception as error:
                    if raised_by_user(error):
                        continue
                    raise Forked(site) from error
                if program not in programs:
                    if len(found) == _MOST_COURSES:
                        raise Forked(site)
                    programs.append(program)
                    asked[len(found)] = dict(answers.asked)
                    found.append(other)
    answers.begin(given)
    return found


def _check_number(answers: Answers, given: Given, whole: list[Any], attempt: Callable[[], Any]) -> None:
    site = answers.numbered
    answers.begin(given, NUMBERS[1])
    try:
        changed = _described(attempt()) != whole
    except Exception as error:
        changed = not raised_by_user(error)
    if changed:
        raise Forked(site)


def _patterns(given: Given, site: Site, times: int) -> list[Pattern]:
    usual = [_opposite(given, site)]
    return usual if times < 2 else [*usual, (False, True), (True, False)]


def _opposite(given: Given, site: Site) -> Pattern:
    return tuple(not answer for answer in given.get(site, (False,)))


class Forked(Exception):
    """A program has courses that cannot be followed.

    Attributes:
        site: the line that decides.
    """

    def __init__(self, site: Site | None) -> None:
        super().__init__(str(site))
        self.site = site


def raised_by_user(error: BaseException) -> bool:
    """Whether the user's own code raised ``error``, and not a library that it called."""
    origin = error.__cause__ or error
    frames = traceback.extract_tb(origin.__traceback__)
    return isinstance(origin, AssertionError) or bool(frames and _is_users(frames[-1].filename))


def line_of(error: BaseException) -> Site | None:
    """The innermost line of the user's code in the traceback of ``error``; None if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)]
    # The code that called the trace is the user's, too, and does not count.
    inside = [i for i, frame in enumerate(frames) if frame.filename.startswith(_OURS)]
    own = own if not inside else [frame for frame in frames[inside[0] :] if _is_users(frame.filename)]
    return Site(own[-1].filename, own[-1].lineno or 0) if own else None


def first_line(error: BaseException) -> str:
    """The type name of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _asking() -> Site | None:
    """The line of the user's model that asks; a line of torch's layer if no user code lies between."""
    layer: Site | None = None
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and file not in _BETWEEN:
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
    """Iterate over the ops of a graph in the order in which they run.

    Args:
        module: a traced graph.

    Yields:
        Nodes of calls and outputs. The nodes of an inner region come at the place of its attribute.
    """
    for node in module.graph.nodes:
        if node.op in ("call_function", "output"):
            yield node
        elif node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            yield from steps(getattr(module, str(node.target)))


def _described(module: fx.GraphModule) -> list[Any]:
    """Target, sources and result sizes of every op. Names are not compared: unused ops leave gaps."""
    numbers: dict[fx.Node, int] = {}
    found: list[Any] = []
    for node in steps(module):
        sources = [numbers.setdefault(source, len(numbers)) for source in node.all_input_nodes]
        made = [t.shape for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]
        sizes = [[size if isinstance(size, int) else -1 for size in shape] for shape in made]
        found.append((str(node.target), sources, sizes))
        numbers[node] = len(numbers)
    return found
