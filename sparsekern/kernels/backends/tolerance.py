"""How far a backend may be from the reference, with the reasons."""

from __future__ import annotations

import torch

# Units in the last place of the larger of an element before and after the step. The order of the
# operations is specified, none is contracted and each is rounded correctly, so results are the same
# bits. In float64 torch's square root and `pow` (in the bias correction) may miss the last bit.
UPDATE_ULPS = {torch.float32: 0.0, torch.float64: 4.0, torch.bfloat16: 0.0, torch.float16: 0.0}

# Float32 sums over a row in any order: n terms in sequence err by about sqrt(n) / 2 roundings; 4
# times that never occurs by chance. Relative to the sum of the absolute values, of which
# norm * norm is a bound. Float64 tensors are summed in float64, and one rounding is left.
SUM_ROUNDINGS = 2.0

# A mean is blended with three roundings in float32.
BLEND_ROUNDINGS = 3.0

# A threshold depends on two square roots of sums: half of their error each, from the row's own and
# the tensor's.
THRESHOLD_ROUNDINGS = 2.0 * SUM_ROUNDINGS

EPS = torch.finfo(torch.float32).eps
