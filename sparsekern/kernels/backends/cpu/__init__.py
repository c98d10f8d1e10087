"""The compiled kernels for tensors on the CPU."""

from sparsekern.kernels.backends.cpu.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.cpu.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.backends.cpu.step import CHECKS_MEMORY as CHECKS_MEMORY
from sparsekern.kernels.backends.cpu.step import channel_moments_ as channel_moments_
from sparsekern.kernels.backends.cpu.step import step_ as step_
