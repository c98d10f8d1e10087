"""The step once more, written from the definitions: one element after the other, in Python floats.

It shares no code with the reference, so it tests the specification itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

INF = float("inf")


@dataclass
class Row:
    """One row: its elements as lists of Python floats, and its entries in the flat arrays."""

    w: list[float]
    d: list[float]
    state: dict[str, list[float]]
    penalty: float = 0.0
    countdown: int = -1
    threshold: float = INF
    activity: float = 0.0
    sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)


def step(rows: list[Row], made: int, options: dict[str, Any], *, tau: float, decay: float) -> int:
    """One step of the rows of one tensor in place; returns how many rows were not finite.

    `made` is the number of earlier steps. `options` are those of the op; with `beta1` the step is Adam's.
    """
    if options["found_inf"] == 1:
        return 0
    live = [row for row in rows if row.countdown != 0]
    for row in live:
        if options["grad_scale"] is not None:
            row.d = [d / options["grad_scale"] for d in row.d]
    learns = options["lr"] != 0
    gradients = [[-d if options["maximize"] else d for d in row.d] for row in live]
    nonfinite = 0
    if learns:
        nonfinite = statistics(rows, live, gradients, tau, decay)
    for row, gradient in zip(live, gradients, strict=True):
        for i, d in enumerate(gradient):
            if "beta1" in options:
                _adam(row, i, d, made + 1, options)
            else:
                _sgd(row, i, d, options)
        if learns:
            fade(row)
    return nonfinite


def statistics(
    rows: list[Row], live: list[Row], gradients: list[list[float]], tau: float, decay: float
) -> int:
    for row in rows:
        row.sums = (0.0, 0.0, 0.0, 0.0)
    counted = []
    for row, gradient in zip(live, gradients, strict=True):
        sums = (
            sum(abs(d) > row.threshold for d in gradient),
            sum(w * d for w, d in zip(row.w, gradient, strict=True)),
            sum(d * d for d in gradient),
            sum(w * w for w in row.w),
        )
        if all(math.isfinite(value) for value in sums):
            row.sums = sums
            counted.append(row)
    size = max(len(rows[0].w), 1)
    total = sum(row.sums[2] * row.sums[3] for row in counted)
    for row in counted:
        row.activity = decay * row.activity + (1 - decay) * row.sums[0] / size
        norm = math.sqrt(row.sums[3])
        rms = math.sqrt(total / (len(counted) * size))
        row.threshold = tau * rms / norm if norm else INF
    return len(live) - len(counted)


def fade(row: Row) -> None:
    k = row.countdown
    if k > 0:
        row.w = [w * (k - 1) / k if k > 1 else 0.0 for w in row.w]
        if k == 1:
            row.state = {name: [0.0] * len(values) for name, values in row.state.items()}
        row.countdown = k - 1


def _sgd(row: Row, i: int, d: float, options: dict[str, Any]) -> None:
    d += (options["weight_decay"] + row.penalty) * row.w[i]
    if options["momentum"]:
        buffers = row.state["momentum_buffers"]
        if options["first"]:
            buffers[i] = d
        else:
            buffers[i] = options["momentum"] * buffers[i] + (1 - options["dampening"]) * d
        d = d + options["momentum"] * buffers[i] if options["nesterov"] else buffers[i]
    row.w[i] -= options["lr"] * d


def _adam(row: Row, i: int, d: float, t: int, options: dict[str, Any]) -> None:
    lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
    decay = options["weight_decay"] + row.penalty
    if options["decoupled"]:
        row.w[i] *= 1 - lr * decay
    else:
        d += decay * row.w[i]
    m, v = row.state["exp_avgs"], row.state["exp_avg_sqs"]
    m[i] = beta1 * m[i] + (1 - beta1) * d
    v[i] = beta2 * v[i] + (1 - beta2) * d * d
    second = v[i]
    if options["amsgrad"]:
        top = row.state["max_exp_avg_sqs"]
        # A NaN wins, as in torch.maximum.
        top[i] = second = second if not second <= top[i] else top[i]
    denominator = math.sqrt(second / (1 - beta2**t)) + options["eps"]
    row.w[i] -= lr * (m[i] / (1 - beta1**t)) / denominator
