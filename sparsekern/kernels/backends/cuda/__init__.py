"""The compiled kernels for tensors on NVIDIA GPUs."""

from sparsekern.kernels.backends.cuda.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.cuda.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.backends.cuda.step import channel_moments_ as channel_moments_
from sparsekern.kernels.backends.cuda.step import step_ as step_

CHECKS_MEMORY = False
"""The ops check the channel arrays and the memory that tensors of a norm share."""
