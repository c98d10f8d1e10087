"""Running a function in a process of its own, with a limit of processor time."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

_context = multiprocessing.get_context("forkserver")


def preload(modules: Sequence[str]) -> None:
    """Import ``modules`` once, in the process from which the others are forked."""
    _context.set_forkserver_preload(list(modules))


def limited(function: Callable[..., Any], *arguments: Any, seconds: int) -> Any:
    """The result of ``function(*arguments)``, which has ``seconds`` of processor time.

    Other work on the machine makes no difference to such a limit. Function, arguments and result are pickled.

    Raises:
        TimeoutError: there was no result in that time.
        RuntimeError: the process ended without a result.
    """
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_send, args=(function, arguments, seconds, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            raise TimeoutError(f"no result in {seconds} s of processor time") from None
        raise RuntimeError(f"no result, exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: int, theirs: Connection) -> None:
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 1))
    theirs.send(function(*arguments))
