"""Agreement between processes that train the same network and must prune it in the same way."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# int64 words of an exchanged message: a digest of 16 bytes, and a flag for failure.
_WORDS = 3
_FAILED = 1


class Ranks:
    """The processes of a group, with checks that all of them decide the same.

    Args:
        model: the model that the Pruner was given; a DistributedDataParallel has its own group.
        group: a process group. None selects the group of ``model``, else the default group, else this
            process alone.
        device: device of the parameters; used if the backend of the group does not communicate on the CPU.

    Attributes:
        size: number of processes.
        rank: rank of this process in the group.

    Raises:
        ValueError: ``group`` is not a process group with this process.
    """

    def __init__(self, model: nn.Module, group: Any, device: torch.device) -> None:
        self._group = _group_of(model, group)
        self.size = 1 if self._group is None else dist.get_world_size(self._group)
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        needs_device = self.size > 1 and "gloo" not in str(dist.get_backend(self._group))
        self._device = device if needs_device else torch.device("cpu")

    @contextmanager
    def agreeing(
        self, what: str, told: Any = None, explain: Callable[[list[Any]], str] | None = None
    ) -> Iterator[Callable[..., None]]:
        """Yield a function that compares its arguments (arrays, plain values) between the processes.

        The block must call the function once, before any change. If a process raises before the call, it
        notifies the others, so that none of them waits.

        Args:
            what: name of the compared values, for the message.
            told: value that the processes exchange if they differ.
            explain: turns the exchanged values, by rank, into the cause for the message; empty for none.

        Raises:
            RuntimeError: on all processes, if they differ or one has failed; names their ranks.
        """
        checked = False

        def check(*parts: Any) -> None:
            nonlocal checked
            checked = True
            self._compare(what, self._exchange(_digest(parts)), told, explain)

        try:
            yield check
        except Exception:
            if not checked:
                self._exchange(None)
            raise

    @contextmanager
    def changing(self, what: str) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        """Yield two functions: all processes call one before the first change and one after the last change.

        Each function raises if another process has failed before its call. A change that is undone when the
        block fails is therefore undone in all processes.

        Args:
            what: name of the change, for the message.

        Raises:
            RuntimeError: another process has failed; names its rank.
        """
        with self.agreeing(what) as done, self.agreeing(what) as ready:
            yield ready, done

    def first(self, values: np.ndarray) -> np.ndarray:
        """The ``values`` (float64, of equal shapes) of the process with rank 0."""
        if self.size == 1:
            return values
        found = torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
        dist.broadcast(found, dist.get_global_rank(self._group, 0), group=self._group)
        own: np.ndarray = found.cpu().numpy()
        return own

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean over the processes of ``values`` (float64, of equal shapes)."""
        if self.size == 1:
            return values
        total = torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
        dist.all_reduce(total, group=self._group)
        mean: np.ndarray = total.cpu().numpy() / self.size
        return mean

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any of the processes."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self._device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return bool(value)

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of each process, by rank."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self._group)
        return every

    def _exchange(self, digest: np.ndarray | None) -> list[tuple[int, ...]]:
        """The message of each process, by rank; ``digest`` (int64 ``[2]``) is None after a failure."""
        own = np.zeros(_WORDS, np.int64)
        if digest is None:
            own[-1] = _FAILED
        else:
            own[:-1] = digest
        if self.size == 1:
            return [tuple(own.tolist())]
        mine = torch.from_numpy(own).to(self._device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self._group)
        return [tuple(words.tolist()) for words in every]

    def _compare(
        self,
        what: str,
        every: list[tuple[int, ...]],
        told: Any,
        explain: Callable[[list[Any]], str] | None,
    ) -> None:
        """Check that all processes sent the same message.

        Raises:
            RuntimeError: messages differ, or a process has failed.
        """
        if len(set(every)) == 1:
            return
        failed = [rank for rank, words in enumerate(every) if words[-1] == _FAILED]
        if failed:
            raise RuntimeError(
                f"{what}: {_named(failed)} failed, expected success of all {self.size} ranks; the errors "
                f"there name the cause"
            )
        # Among equally frequent messages, that of the lowest rank counts as the common one.
        common = Counter(every).most_common(1)[0][0]
        others = [rank for rank, words in enumerate(every) if words != common]
        # All processes detect the difference, so all of them reach this collective call.
        cause = "" if explain is None else explain(self.gather(told))
        raise RuntimeError(
            f"{what}: got other values in {_named(others)} of {self.size} than in rank "
            f"{every.index(common)}, expected equal arguments and models, and gradients averaged over all "
            f"ranks" + (f"; {cause}" if cause else "")
        )


def _named(ranks: list[int]) -> str:
    """The ranks in words, for messages."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _group_of(model: nn.Module, group: Any) -> Any:
    """The process group for ``model``; None for this process alone.

    Raises:
        ValueError: ``group`` is neither None nor a process group.
    """
    if group is not None:
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"process_group: got {group!r}, expected a torch.distributed.ProcessGroup with this process"
            )
        return group
    # torch.compile may wrap DistributedDataParallel, or the reverse.
    for candidate in (model, getattr(model, "_orig_mod", None)):
        if isinstance(candidate, DistributedDataParallel):
            return candidate.process_group
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _digest(parts: tuple[Any, ...]) -> np.ndarray:
    """BLAKE2b digest of the parts, int64 ``[2]``."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(repr((part.dtype.str, part.shape)).encode())
            state.update(np.ascontiguousarray(part).tobytes())
        else:
            state.update(repr(part).encode())
    return np.frombuffer(state.digest(), np.int64)
