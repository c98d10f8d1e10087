"""Tolerances between a backend and the reference, with their derivations."""

from __future__ import annotations

import torch

# Difference in units in the last place of the element before or after the step, whichever is larger. The
# order of the operations is specified, and each operation is rounded correctly and separately, so results
# are bitwise equal. In float64, torch's square root and `pow` (in the bias correction) may be wrong in the
# last bit.
UPDATE_ULPS = {torch.float32: 0.0, torch.float64: 4.0, torch.bfloat16: 0.0, torch.float16: 0.0}

# Float32 sums over a row in any order, in units of sqrt(n) roundings. A sum of n terms in sequence has an
# error of about sqrt(n) / 2 roundings; 4 times that does not occur by chance. The error is relative to the
# sum of the absolute values, and norm * norm bounds that sum. Float64 tensors are summed in float64 and
# rounded once.
SUM_ROUNDINGS = 2.0

# The update of a mean has three roundings in float32.
BLEND_ROUNDINGS = 3.0

# A threshold depends on two square roots of sums, one of the row and one of the tensor. A square root halves
# the relative error.
THRESHOLD_ROUNDINGS = 2.0 * SUM_ROUNDINGS

EPS = torch.finfo(torch.float32).eps
