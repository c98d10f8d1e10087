"""What tracing must not leave behind: random numbers, messages, source lines, collected garbage."""

from __future__ import annotations

import gc
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import torch
import torch.fx.config

from sparsekern.graph.capture.hooks import without_global_hooks

_LOGS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore random generators afterwards, run compiled parts eagerly and hide the tracer's messages.

    Inside, all generators start from the same state, so that a program repeats. Logs are off because a
    forward that fails on fake tensors raises an error that is reported anyway.
    """
    python, legacy = random.getstate(), np.random.get_state()
    logs = [logging.getLogger(name) for name in _LOGS]
    disabled = [log.disabled for log in logs]
    for log in logs:
        log.disabled = True
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.compiler.set_stance("force_eager"),
            without_global_hooks(),
            warnings.catch_warnings(),
            # The tracer prints the partial graph when it fails.
            redirect_stderr(StringIO()),
            # Prints of the model would show tensors without data.
            redirect_stdout(StringIO()),
        ):
            warnings.simplefilter("ignore")
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            yield
    finally:
        for log, before in zip(logs, disabled, strict=True):
            log.disabled = before
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def low_overhead_tracing() -> Iterator[None]:
    """Disable source lines of nodes and garbage collection; a trace takes a third less time."""
    collecting, lines = gc.isenabled(), getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    gc.disable()
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = lines
        if collecting:
            gc.enable()
