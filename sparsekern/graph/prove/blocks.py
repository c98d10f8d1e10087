"""Finding the residual blocks that can be removed as a whole, and proving it.

A block qualifies if its ops are the identity as soon as some of its parameters are zero (``identity``), and
if the program without the block is the whole program without the block's ops. Both are checked in every
traced mode; for the second the copy runs, or is exported, with blocks removed from their list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.courses import first_line
from sparsekern.graph.capture.export import Capture
from sparsekern.graph.capture.matching import exported
from sparsekern.graph.capture.program import Captured
from sparsekern.graph.capture.record import Origin, Record, Step, live, of_one_program
from sparsekern.graph.capture.source import Source
from sparsekern.graph.containers import containers, keep_blocks
from sparsekern.graph.prove.identity import Identity, Needed, read_later, tensors_read, viewed
from sparsekern.graph.prove.recheck import Whole, whole_of


@dataclass(frozen=True, eq=False)
class FoundBlock:
    """A block that can be removed.

    Attributes:
        container: path of the list.
        index: its number in the list.
        writers: numbers of the parameters that make the block the identity when they are zero.
        tensors: numbers of the parameters and buffers that go with it.
    """

    container: str
    index: int
    writers: tuple[int, ...]
    tensors: frozenset[int]

    @property
    def path(self) -> str:
        """Path of the block."""
        return f"{self.container}.{self.index}" if self.container else str(self.index)


def find_blocks(captured: Capture) -> tuple[tuple[FoundBlock, ...], dict[str, str]]:
    """Find the removable blocks of a traced model.

    Args:
        captured: the traced model.

    Returns:
        The blocks in the order of their lists, and the reasons why others of these lists stay, by path.
    """
    source = captured.source
    lists = containers(source.clone)
    programs = [_Program(whole_of(source, graph)) for graph in captured.graphs]
    found: list[FoundBlock] = []
    refused: dict[str, str] = {}
    for container, module in lists.items():
        for index, block in enumerate(module.children()):
            path = f"{container}.{index}" if container else str(index)
            made = _block(source, programs, container, index, path, block)
            if isinstance(made, FoundBlock):
                found.append(made)
            elif made:
                refused[path] = made
    # The innermost blocks are removed one by one; what contains them stays.
    paths = [block.path for block in found]
    outer = {p for p in paths if any(q.startswith(f"{p}.") for q in paths)}
    proved, failed = _proved(source, programs, [block for block in found if block.path not in outer], lists)
    with_blocks = {block.container for block in proved} | {path.rpartition(".")[0] for path in failed}
    reasons = {p: reason for p, reason in refused.items() if p.rpartition(".")[0] in with_blocks}
    return tuple(proved), reasons | failed


class _Program:
    """The program of a graph, with its nodes by module."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        self.graph: Captured = whole.graph
        self.module_of: dict[fx.Node, str] = {}
        self.holders: dict[fx.Node, int] = {}
        # The input and the outputs of every block that is the identity when its writers are zero.
        self.ends: dict[str, tuple[fx.Node, list[fx.Node]]] = {}
        for node in self.graph.module.graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack and node.op not in ("placeholder", "output"):
                self.module_of[node] = str(list(stack.values())[-1][0])
            source = self.graph.sources.get(node.name)
            if node.op == "placeholder" and isinstance(source, int):
                self.holders[node] = source

    def inside(self, path: str) -> dict[fx.Node, None] | None:
        """The nodes of a module, in order; None if it is called more than once."""
        paths = self.module_of.items()
        if any(name.startswith(f"{path}@") for _, name in paths):
            return None
        return {node: None for node, name in paths if name == path or name.startswith(f"{path}.")}


def _block(
    source: Source, programs: Sequence[_Program], container: str, index: int, path: str, block: nn.Module
) -> FoundBlock | str:
    """A block whose ops are the identity when some of its parameters are zero, or why it is none."""
    prefix = f"{path}."
    tensors = {
        number
        for number, entry in enumerate(source.tensors)
        if any(name.startswith(prefix) for name in entry.names)
    }
    shared = [n for n in tensors if not all(name.startswith(prefix) for name in source.tensors[n].names)]
    if not any(source.tensors[number].parameter for number in tensors):
        return ""
    if shared:
        return f"it shares {source.tensors[shared[0]].names[0]} with other modules"
    needed: Needed = frozenset()
    for program in programs:
        own = _needed(program, path, {n for n in tensors if source.tensors[n].parameter}, tensors)
        if isinstance(own, str):
            return own
        needed |= own
    return FoundBlock(container, index, tuple(sorted(needed)), frozenset(tensors))


def _needed(program: _Program, path: str, parameters: set[int], tensors: set[int]) -> Needed | str:
    """The parameters that make the block the identity in one graph, or why there are none."""
    nodes = program.inside(path)
    if nodes is None:
        return "it is called more than once"
    if not nodes:
        return "it is not called"
    own = {node: number for node, number in program.holders.items() if number in parameters}
    held = {node for node, number in program.holders.items() if number in tensors}
    if any(user not in nodes for node in held for user in node.users):
        return "its parameters are read outside of it"
    exits = [node for node in nodes if any(user not in nodes for user in node.users)]
    if not exits:
        return "nothing reads its output"
    form = _form(exits[0])
    entries = tensors_read(nodes, lambda node: node not in held and _form(node) == form)
    for entry in entries:
        analysis = Identity(nodes, own, entry)
        found = [analysis.needed(node) for node in exits]
        known = [one for one in found if one is not None]
        if len(known) == len(exits) and not _writes(nodes, held, analysis):
            program.ends[path] = entry, exits
            return frozenset().union(*known)
    return "it does not return its input when its last layers are zero"


def _form(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def _writes(nodes: Mapping[fx.Node, None], held: set[fx.Node], analysis: Identity) -> bool:
    """Whether an op of the block may change values that other modules hold or that later ops read."""
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not isinstance(node.args[0], fx.Node):
            continue
        base, keeps = viewed(node.args[0]), analysis.same(node) is not None
        if not keeps and base not in nodes and base not in held:
            return True
        if (not keeps or analysis.same(node.args[0]) is None) and read_later(node.args[0], node):
            return True
    return False


def _proved(
    source: Source, programs: Sequence[_Program], found: Sequence[FoundBlock], lists: Mapping[str, nn.Module]
) -> tuple[list[FoundBlock], dict[str, str]]:
    """The blocks without which the program is the same but for their ops, and why others are not.

    Blocks are removed in three sets: as many as possible, those with even and those with odd numbers. If a
    set fails, every block is tried alone, and the set again without the blocks that failed.
    """
    left, failed = list(found), dict[str, str]()
    while left:
        wrong = next((w for some in _sets(left, lists) if (w := _wrong(source, programs, some))), "")
        if not wrong:
            break
        alone = {block.path: w for block in left if (w := _wrong(source, programs, [block]))}
        # Blocks that fail only together cannot be told apart.
        alone = alone or {block.path: wrong for block in left}
        failed |= alone
        left = [block for block in left if block.path not in failed]
    return left, failed


def _sets(found: Sequence[FoundBlock], lists: Mapping[str, nn.Module]) -> Iterator[list[FoundBlock]]:
    first = {path: next((b.index for b in found if b.container == path), -1) for path in lists}
    whole = {path for path in lists if sum(b.container == path for b in found) == len(lists[path]._modules)}
    yield [b for b in found if b.container not in whole or b.index != first[b.container]]
    for parity in (0, 1):
        yield [b for b in found if b.index % 2 == parity]


def kept_of(blocks: Iterable[FoundBlock], lists: Mapping[str, nn.Module]) -> dict[str, list[int]]:
    """The numbers of the blocks that stay when ``blocks`` go, for each list that loses some."""
    gone: dict[str, set[int]] = {}
    for block in blocks:
        gone.setdefault(block.container, set()).add(block.index)
    return {
        path: [n for n in range(len(lists[path]._modules)) if n not in numbers]
        for path, numbers in gone.items()
    }


def _wrong(source: Source, programs: Sequence[_Program], blocks: Sequence[FoundBlock]) -> str:
    """Why the program without ``blocks`` is another one; empty if it is not."""
    kept = kept_of(blocks, containers(source.clone))
    if not blocks or not all(kept.values()):
        return ""
    try:
        with ExitStack() as undo:
            keep_blocks(source.clone, kept, undo)
            with source.renamed():
                for program in programs:
                    if not _is_without(source, program, blocks):
                        return "the program without it runs other ops"
    except Exception as error:
        return f"the program does not run without it: {first_line(error)}"
    return ""


def _is_without(source: Source, program: _Program, blocks: Sequence[FoundBlock]) -> bool:
    """Whether the copy's present program is ``program`` without the ops of ``blocks``."""
    whole, graph = program.whole, program.graph
    other: Record | None = None
    if whole.exported:
        small = exported(source.again(graph))
    else:
        small = source.record(graph.training, None, graph.course) or Record()
        other = source.record(True) if graph.both else None
    expected = _without(program, live(whole.record), blocks)
    same = expected is not None and _alike(expected, live(small))
    return same and (not graph.both or (other is not None and of_one_program(small, other)))


def _alike(expected: Sequence[Step], found: Sequence[Step]) -> bool:
    def form(step: Step) -> Any:
        return step.target, step.sources, step.numbers, step.shapes, step.plain

    return [form(step) for step in expected] == [form(step) for step in found]


def _without(program: _Program, steps: Sequence[Step], blocks: Sequence[FoundBlock]) -> list[Step] | None:
    """The steps of the program without those of the blocks, whose readers read the blocks' inputs instead."""
    origins = _origins(program, steps)
    gone: set[fx.Node] = set()
    moved: dict[Origin, Origin] = {}
    for block in blocks:
        gone.update(program.inside(block.path) or {})
        entry, exits = program.ends[block.path]
        moved |= {origins[n]: origins[entry] for n in exits if n in origins and entry in origins}
    left: list[Step] = []
    new: dict[Origin, Origin] = {}
    for number, step in enumerate(steps):
        if step.node in gone:
            continue
        sources = []
        for origin in step.sources:
            while origin in moved:
                origin = moved[origin]
            if isinstance(origin[0], int) and origin not in new:
                return None  # something else that a block makes is read
            sources.append(new.get(origin, origin))
        for output in range(max(len(step.shapes), 1)):
            new[number, output] = len(left), output
        left.append(step._replace(sources=tuple(sources)))
    return left


def _origins(program: _Program, steps: Sequence[Step]) -> dict[fx.Node, Origin]:
    """Where the values that the steps read come from, by node."""
    found: dict[fx.Node, Origin] = {}
    for step in steps:
        if step.node is None:
            continue
        if program.whole.exported:
            operands = list(step.node.all_input_nodes)
        else:
            leaves = pytree.tree_leaves((step.node.args, step.node.kwargs))
            operands = [n for n in leaves if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), Tensor)]
        if len(operands) == len(step.sources):
            found.update(zip(operands, step.sources, strict=True))
    return found
