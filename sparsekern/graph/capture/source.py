"""A copy of a model on fake tensors, which runs, is recorded and is exported in place of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import wraps
from typing import Any
from unittest import mock

import torch
import torch.fx.config
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.courses import (
    Answers,
    Forked,
    Given,
    Pattern,
    Site,
    courses,
    first_line,
    followed,
    line_of,
)
from sparsekern.graph.capture.hooks import detach_hooks, keep_own_hooks
from sparsekern.graph.capture.kept import Keeping
from sparsekern.graph.capture.program import CONSTANT, INPUT, Captured
from sparsekern.graph.capture.record import Record, Recorder
from sparsekern.graph.capture.remembered import Memoised, forget_results
from sparsekern.graph.capture.twin import fake_copy, registered
from sparsekern.graph.capture.undisturbed import undisturbed
from sparsekern.graph.capture.unused import drop_unused


class Source:
    """A copy of the model on fake tensors, with fake inputs. Graphs are exported from it.

    Args:
        model: the model to copy. It does not change.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.

    Attributes:
        mode: the fake tensor mode of the copy.
        clone: the copy.
        tensors: the copy's parameters and buffers by number. A tied tensor appears once.
        held: the tensors themselves, by number.
        smaller: smaller tensors that have replaced them, by number and shape.

    Raises:
        ValueError: the model cannot be copied or has uninitialised parameters.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # The shape environment allows programs that read numbers from tensors.
        self._answers = Answers()
        self._given: dict[bool, Given] = {False: {}, True: {}}
        self._settled: set[bool] = set()
        self._doubled = False
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        with undisturbed():
            self.clone = fake_copy(model, self.mode)
            self._example = pytree.tree_map_only(
                Tensor, lambda t: self.mode.from_tensor(t, static_shapes=True), (args, dict(kwargs))
            )
        # Hooks that need data fail on the first run; until then, those of the model itself run.
        self._hooks_may_fail = keep_own_hooks(self.clone)
        self._memoised = Memoised(self.clone)
        if self._memoised.any_filled:
            # This run shows which of the functions the forward calls.
            with suppress(Exception), self._restored(Keeping(self.clone)):
                self._once(False, {})
        forget_results(self.clone, lambda training: self._once(training, {}))
        self.tensors, self.held = registered(self.clone)
        self.smaller: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._numbers = {name: n for n, entry in enumerate(self.tensors) for name in entry.names}

    def export(self, training: bool) -> list[Captured]:
        """Export the graphs of one mode: one for each course of a program that decides by values.

        Args:
            training: whether to export training mode.

        Returns:
            The graphs.

        Raises:
            ValueError: the forward rejects the inputs.
            Undecided: the forward has courses that cannot be followed.
        """
        with self._undisturbed(), self._returning_kept() as kept:
            program = self._followed(training, lambda: self._program(training))
            given = self._given[training]
            found = [given]
            if training not in self._settled and (self._answers.asked or self._answers.numbered):
                try:
                    found = courses(
                        self._answers,
                        given,
                        program.graph_module,
                        lambda: self._program(training).graph_module,
                    )
                except Forked as error:
                    raise Undecided(self.undecided(training, error.site)) from error.__cause__
            self._settled.add(training)
            first = self._captured(program, training, kept, given)
        others = [replace(self._export(training, course), first=False) for course in found[1:]]
        return [replace(first, course=dict(given)), *others]

    def again(self, graph: Captured) -> Captured:
        """Export the mode and course of ``graph`` again, with the present tensors of the copy.

        Raises:
            ValueError: the copy cannot be traced.
        """
        return self._export(graph.training, graph.course)

    def _export(self, training: bool, course: Mapping[Site, Pattern]) -> Captured:
        with self._undisturbed(), self._returning_kept() as kept, self._on(training, course):
            program = self._followed(training, lambda: self._program(training))
            return self._captured(program, training, kept, course)

    @contextmanager
    def _on(self, training: bool, course: Mapping[Site, Pattern] | None) -> Iterator[None]:
        """Give the answers of a course while the context lasts; those of the first one if it is None."""
        usual = self._given[training]
        self._given[training] = usual if course is None else dict(course)
        try:
            yield
        finally:
            self._given[training] = usual

    def _captured(
        self, program: ExportedProgram, training: bool, kept: list[str], course: Mapping[Site, Pattern]
    ) -> Captured:
        sources: dict[str, int | str] = {}
        constants: dict[str, Any] = {}
        for spec in program.graph_signature.input_specs:
            name = getattr(spec.arg, "name", None)
            if name is None:
                continue
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in self._numbers:
                sources[name] = self._numbers[spec.target]
            elif spec.kind == InputKind.USER_INPUT:
                sources[name] = INPUT
            else:
                sources[name] = CONSTANT
                constants[name] = program.constants.get(spec.target)
        return Captured(program.graph_module, sources, constants, training, tuple(kept), course)

    def record(
        self,
        training: bool,
        numbers: Mapping[int, int] | None = None,
        course: Mapping[Site, Pattern] | None = None,
    ) -> Record | None:
        """Record the ops of a run.

        Args:
            training: whether to run in training mode.
            numbers: the number of every registered tensor, by ``id``; None if the copy is whole.
            course: the answers to conditions on values; None for those of the first course.

        Returns:
            The record; None if the run asks for values in tensors that no export of its mode has settled.

        Raises:
            Exception: any error of the forward.
        """
        known = {id(tensor): n for n, tensor in self.held.items()} if numbers is None else numbers
        keeping = Keeping(self.clone)
        with self._restored(keeping) as replaced:
            with self._on(training, course):
                output, recorder = self._once(training, known)
            made = recorder.record((output, [tensor for _, tensor in keeping.new()], replaced()))
        asked = self._answers.asked or self._answers.numbered
        return None if asked and training not in self._settled else made

    @contextmanager
    def renamed(self) -> Iterator[None]:
        """Follow the names that the tensors of the copy have now, while the context lasts."""
        usual = self._numbers
        numbers = {id(tensor): number for number, tensor in self.held.items()}
        tensors = (
            *self.clone.named_parameters(remove_duplicate=False),
            *self.clone.named_buffers(remove_duplicate=False),
        )
        self._numbers = {name: numbers[id(tensor)] for name, tensor in tensors}
        try:
            yield
        finally:
            self._numbers = usual

    def run(self, training: bool) -> Any:
        """Run the copy in the mode and on the inputs of ``export``.

        Args:
            training: whether to run in training mode.

        Returns:
            The output of the copy, on fake tensors.

        Raises:
            Exception: any error of the forward.
        """
        with self._restored(Keeping(self.clone)):
            return self._once(training, {})[0]

    @contextmanager
    def _restored(self, keeping: Keeping) -> Iterator[Callable[[], list[Tensor]]]:
        """Restore at the end what a forward assigns to modules.

        Yields:
            A function that lists the tensors that were assigned to parameters and buffers.
        """
        tables: list[dict[str, Any]] = [
            table for module in self.clone.modules() for table in (module._parameters, module._buffers)
        ]
        held = [dict(table) for table in tables]

        def replaced() -> list[Tensor]:
            pairs = zip(tables, held, strict=True)
            return [t for now, old in pairs for name, t in now.items() if t is not old.get(name)]

        try:
            yield replaced
        finally:
            for table, old in zip(tables, held, strict=True):
                if table.keys() != old.keys() or any(t is not old[name] for name, t in table.items()):
                    table.clear()
                    table.update(old)
            keeping.restore()

    def _once(self, training: bool, numbers: Mapping[int, int]) -> tuple[Any, Recorder]:
        """Run the copy and leave what its forward keeps on its modules."""
        self.clone.train(training)
        args, kwargs = self._inputs(training)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

        def attempt() -> tuple[Any, Recorder]:
            recorder = Recorder(numbers, inputs)
            # Without the Python dispatcher, a mode sees no composite ops.
            with enable_python_dispatcher(), recorder:
                return self.clone(*args, **kwargs), recorder

        with self._undisturbed(), self.mode, torch.no_grad(), _as_in_an_export():
            made: tuple[Any, Recorder] = self._followed(training, attempt)
            return made

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with undisturbed(), self._answers.used(), self._memoised.forgotten():
            yield

    def _followed(self, training: bool, attempt: Callable[[], Any]) -> Any:
        """The result of ``attempt``; without hooks if they are in its way."""

        def follow() -> Any:
            return followed(self._answers, self._given[training], training in self._settled, attempt)

        try:
            result = follow()
        except Exception as error:
            if not self._hooks_may_fail:
                raise
            detach_hooks(self.clone)
            try:
                result = follow()
            except Exception:
                raise error from error.__cause__
        self._hooks_may_fail = False
        return result

    @contextmanager
    def _returning_kept(self) -> Iterator[list[str]]:
        """Make the copy return a pair: its output, and the tensors that it leaves on its modules.

        Yields:
            A list of the places where the tensors were kept, filled by the forward. The modules get
            their earlier objects back.
        """
        keeping, forward, own = Keeping(self.clone), self.clone.forward, vars(self.clone).get("forward")
        kept: list[str] = []

        @wraps(forward)
        def returning(*args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
            output, new = forward(*args, **kwargs), keeping.new()
            # Before the forward returns: the tracer rejects changed attributes.
            keeping.restore()
            kept[:] = [where for where, _ in new]
            return output, tuple(tensor for _, tensor in new)

        self.clone.forward = returning
        try:
            yield kept
        finally:
            del self.clone.forward
            if own is not None:
                self.clone.forward = own
            keeping.restore()

    def _inputs(self, training: bool) -> tuple[Any, Any]:
        if training and self._doubled:
            with self.mode:
                return _doubled(*self._example)
        args, kwargs = self._example
        return args, kwargs

    def _program(self, training: bool) -> ExportedProgram:
        self.clone.train(training)
        try:
            program = torch.export.export(self.clone, *self._inputs(training), strict=False)
        except Exception as error:
            if training and not self._doubled and _single(*self._example):
                # A batch norm behind a global pool cannot train on a batch of one.
                self._doubled = True
                with suppress(ValueError):
                    return self._program(training)
                self._doubled = False
            raise self.rejected(training, error) from error
        drop_unused(program.graph_module)
        return program

    def rejected(self, training: bool, error: Exception) -> ValueError:
        """Make the exception for a copy that does not run at its full size.

        Args:
            training: whether the copy ran in training mode.
            error: the error of the copy.

        Returns:
            A ValueError that names ``example_inputs``, or an ``Undecided`` that names ``model``.
        """
        if isinstance(error, GuardOnDataDependentSymNode):
            site = self._answers.stuck or line_of(error)
            return Undecided(f"{self.undecided(training, site)}; it raised {first_line(error)}")
        args, kwargs = self._example
        given = ", ".join([_describe(a) for a in args] + [f"{n}={_describe(a)}" for n, a in kwargs.items()])
        site = line_of(error)
        at = f" at {site}" if site else ""
        return ValueError(
            f"example_inputs: got ({given}), expected what {type(self.clone).__name__}.forward accepts in "
            f"{_named(training)}; it raised {first_line(error)}{at}"
        )

    def undecided(self, training: bool, site: Site | None) -> str:
        """The message for a forward whose courses at ``site`` cannot be followed together."""
        at = f" at {site}" if site else ""
        return (
            f"model: in {_named(training)} {type(self.clone).__name__}.forward decides by the values in "
            f"tensors{at}, expected one whose course follows from shapes"
        )


def _as_in_an_export() -> Any:
    """A context in which a program that asks whether it is exported gets the answer yes."""
    return mock.patch.multiple(torch.compiler, create=True, _is_compiling_flag=True, _is_exporting_flag=True)


class Undecided(ValueError):
    """The ops of a program depend on the values in tensors, so one trace cannot represent it."""


def _named(training: bool) -> str:
    return f"{'training' if training else 'evaluation'} mode"


def _single(args: Any, kwargs: Any) -> bool:
    """Whether there are tensors and all of them have a first dimension of size 1."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
    return bool(tensors) and all(t.shape[0] == 1 for t in tensors)


def _doubled(args: Any, kwargs: Any) -> tuple[Any, Any]:
    twice: tuple[Any, Any] = pytree.tree_map_only(
        Tensor, lambda t: torch.cat([t, t]) if t.ndim else t, (args, kwargs)
    )
    return twice


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_describe(item) for item in value) + ")"
    return type(value).__name__
