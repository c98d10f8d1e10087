"""The compiled kernels for tensors on the CPU."""

from sparsekern.kernels.backends.cpu.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.cpu.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.backends.cpu.step import channel_moments_ as channel_moments_
from sparsekern.kernels.backends.cpu.step import step_ as step_

CHECKS_MEMORY = True
"""Native code checks the channel arrays and the memory that tensors of a norm share, so the ops do not."""
