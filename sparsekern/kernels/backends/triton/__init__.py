"""Triton kernels of all operations, for GPUs without the compiled CUDA library."""

from sparsekern.kernels.backends.triton.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.triton.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.backends.triton.step import channel_moments_ as channel_moments_
from sparsekern.kernels.backends.triton.step import step_ as step_

CHECKS_MEMORY = False
"""The ops check the channel arrays and the memory that tensors of a norm share."""
