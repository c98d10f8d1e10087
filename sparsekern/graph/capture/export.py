"""The model's ATen graphs in evaluation and training mode, exported from a copy on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.fx.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

from sparsekern.distributed.tensors import check_not_flattened, copy_module, fake, settle, unwrap
from sparsekern.graph.capture.courses import Answers, Site, followed, fork, line_of
from sparsekern.graph.capture.hooks import detach_hooks
from sparsekern.graph.capture.kept import Keeping
from sparsekern.graph.capture.program import CONSTANT, INPUT, Captured, Registered
from sparsekern.graph.capture.undisturbed import undisturbed
from sparsekern.graph.capture.unused import drop_unused
from sparsekern.nn import MultiheadAttention


@dataclass(frozen=True)
class Capture:
    """The result of tracing.

    Attributes:
        tensors: The model's parameters and buffers. A tied tensor appears once.
        graphs: One graph for each traced mode, evaluation mode first.
        source: The copy that the graphs are exported from.
        untraced: Why there is no graph of training mode; empty if there is one.
    """

    tensors: tuple[Registered, ...]
    graphs: tuple[Captured, ...]
    source: Source
    untraced: str = ""


class Source:
    """A copy of the model on fake tensors, with fake inputs. Graphs are exported from it.

    Args:
        model: The model to copy. It does not change.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Attributes:
        mode: The fake tensor mode of the copy.
        clone: The copy.
        tensors: The copy's parameters and buffers by number. A tied tensor appears once.
        held: The tensors themselves, by number.
        smaller: Smaller tensors that have replaced them, by number and shape.

    Raises:
        ValueError: The model cannot be copied or has uninitialised parameters.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # The shape environment allows programs that read numbers from tensors.
        self._answers = Answers()
        self._given: dict[bool, dict[Site, bool]] = {False: {}, True: {}}
        self._settled: set[bool] = set()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        with undisturbed():
            self.clone = _fake_copy(model, self.mode)
            self._example = pytree.tree_map_only(
                Tensor, lambda t: self.mode.from_tensor(t, static_shapes=True), (args, dict(kwargs))
            )
        self.tensors, self.held = _registered(self.clone)
        self.smaller: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._numbers = {name: n for n, entry in enumerate(self.tensors) for name in entry.names}
        self._doubled = False

    def export(self, training: bool) -> Captured:
        """Export the graph of one mode.

        Args:
            training: Whether to export training mode.

        Returns:
            The graph.

        Raises:
            ValueError: The forward rejects the inputs.
            Undecided: The forward decides by the values in tensors.
        """
        with undisturbed(), self._answers.used(), self._returning_kept() as kept:
            program = self._followed(training, lambda: self._program(training))
            if training not in self._settled and (self._answers.asked or self._answers.numbered):
                site = fork(
                    self._answers, self._given[training], lambda: self._program(training).graph_module
                )
                if site is not None:
                    raise Undecided(self._undecided(training, site))
            self._settled.add(training)
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
        return Captured(program.graph_module, sources, constants, training, tuple(kept))

    def run(self, training: bool) -> Any:
        """Run the copy in the mode and on the inputs of ``export``.

        Args:
            training: Whether to run in training mode.

        Returns:
            The output of the copy, on fake tensors.

        Raises:
            Exception: Any error of the forward.
        """
        self.clone.train(training)
        args, kwargs = self._inputs(training)
        keeping = Keeping(self.clone)
        try:
            with undisturbed(), self._answers.used(), self.mode, torch.no_grad():
                return self._followed(training, lambda: self.clone(*args, **kwargs))
        finally:
            keeping.restore()

    def _followed(self, training: bool, attempt: Callable[[], Any]) -> Any:
        return followed(self._answers, self._given[training], training in self._settled, attempt)

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
            training: Whether the copy ran in training mode.
            error: The error of the copy.

        Returns:
            A ValueError that names ``example_inputs``, or an ``Undecided`` that names ``model``.
        """
        if isinstance(error, GuardOnDataDependentSymNode):
            site = self._answers.stuck or line_of(error)
            return Undecided(f"{self._undecided(training, site)}; it raised {first_line(error)}")
        args, kwargs = self._example
        given = ", ".join([_describe(a) for a in args] + [f"{n}={_describe(a)}" for n, a in kwargs.items()])
        site = line_of(error)
        at = f" at {site}" if site else ""
        return ValueError(
            f"example_inputs: got ({given}), expected what {type(self.clone).__name__}.forward accepts in "
            f"{_named(training)}; it raised {first_line(error)}{at}"
        )

    def _undecided(self, training: bool, site: Site | None) -> str:
        at = f" at {site}" if site else ""
        return (
            f"model: in {_named(training)} {type(self.clone).__name__}.forward decides by the values in "
            f"tensors{at}, expected one whose course follows from shapes"
        )


class Undecided(ValueError):
    """The ops of a program depend on the values in tensors, so one trace cannot represent it."""


def _named(training: bool) -> str:
    return f"{'training' if training else 'evaluation'} mode"


def inner_module(model: object) -> nn.Module:
    """Find the module to trace.

    Args:
        model: A module, or a wrapper of one such as by ``torch.compile`` or data parallelism.

    Returns:
        The wrapped module.

    Raises:
        ValueError: ``model`` is no module, or is a FullyShardedDataParallel.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    # The wrappers of torch.compile and data parallelism hold the module itself, with the same parameters.
    inner = unwrap(model)
    check_not_flattened(inner)
    return inner


def arguments(example_inputs: object) -> tuple[Any, ...]:
    """Make positional arguments from example inputs.

    Args:
        example_inputs: A tensor, or a tuple or list of positional arguments.

    Returns:
        The arguments.

    Raises:
        ValueError: ``example_inputs`` is anything else.
    """
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(args, (tuple, list)):
        raise ValueError(
            f"example_inputs: got {type(example_inputs).__name__}, expected a tensor or a tuple "
            "of the arguments of the model's forward"
        )
    return tuple(args)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Capture:
    """Trace ``model`` in both modes on fake tensors; ``model`` itself is never run or changed.

    If training mode raises and evaluation mode reads every parameter, the graph of evaluation mode is
    enough: the values that only training mode computes have no channels of their own.

    Args:
        model: The model.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Returns:
        The model's tensors and its graphs.

    Raises:
        ValueError: ``model`` cannot be copied, has uninitialised parameters or decides by the values
            in tensors (the message names ``model``), or its forward rejects the inputs (the message
            names ``example_inputs``).
    """
    source = Source(model, args, kwargs)
    evaluation = source.export(False)
    try:
        return Capture(source.tensors, (evaluation, source.export(True)), source)
    except Undecided:
        raise
    except ValueError as error:
        unread = _unread(source, evaluation)
        if unread:
            raise ValueError(
                f"{error}; training mode alone may read {len(unread)} parameters ({', '.join(unread[:3])}), "
                "so that evaluation mode does not tell which channels go together"
            ) from error
        return Capture(source.tensors, (evaluation,), source, str(error))


def _unread(source: Source, graph: Captured) -> list[str]:
    """The parameters that no op of ``graph`` reads."""
    placeholders = [node for node in graph.module.graph.nodes if node.op == "placeholder" and node.users]
    read = {graph.sources.get(node.name) for node in placeholders}
    return [t.names[0] for number, t in enumerate(source.tensors) if t.parameter and number not in read]


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    memo: dict[int, Any] = {}
    settle(model)
    for name, tensor in _all_tensors(model):
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"model: parameter {name!r} is not initialised yet, expected a model that has been run once"
            )
        if id(tensor) not in memo:
            memo[id(tensor)] = fake(tensor, mode)
    try:
        clone = copy_module(model, memo, partial(mode.from_tensor, static_shapes=True))
    except Exception as error:
        raise ValueError(
            f"model: {type(model).__name__} cannot be copied for tracing: {type(error).__name__}: {error}"
        ) from error
    detach_hooks(clone)
    for module in clone.modules():
        # This class computes the same as torch's attention, in a form from which heads can be removed.
        if MultiheadAttention.fits(module):
            MultiheadAttention.adopt(module)
    return clone


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _registered(clone: nn.Module) -> tuple[tuple[Registered, ...], dict[int, Tensor]]:
    """Descriptions and tensors of the copy's parameters and buffers, by number. A tied tensor counts once."""
    names: dict[int, list[str]] = {}
    held: dict[int, Tensor] = {}
    for name, tensor in _all_tensors(clone):
        names.setdefault(id(tensor), []).append(name)
        held[id(tensor)] = tensor
    tensors = tuple(
        Registered(
            tuple(names[key]),
            tuple(tensor.shape),
            isinstance(tensor, nn.Parameter),
            tensor.element_size(),
        )
        for key, tensor in held.items()
    )
    return tensors, dict(enumerate(held.values()))


def _single(args: Any, kwargs: Any) -> bool:
    """Whether there are tensors and all of them have a first dimension of size 1."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
    return bool(tensors) and all(t.shape[0] == 1 for t in tensors)


def _doubled(args: Any, kwargs: Any) -> tuple[Any, Any]:
    twice: tuple[Any, Any] = pytree.tree_map_only(
        Tensor, lambda t: torch.cat([t, t]) if t.ndim else t, (args, kwargs)
    )
    return twice


def first_line(error: BaseException) -> str:
    """The type name of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_describe(item) for item in value) + ")"
    return type(value).__name__
