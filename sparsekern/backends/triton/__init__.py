"""Triton kernels of everything, for GPUs where nothing was compiled."""

from sparsekern.backends.triton.norm_act import norm_act_backward as norm_act_backward
from sparsekern.backends.triton.norm_act import norm_act_forward as norm_act_forward
from sparsekern.backends.triton.steps import adam_step_ as adam_step_
from sparsekern.backends.triton.steps import channel_moments_ as channel_moments_
from sparsekern.backends.triton.steps import row_mask_ as row_mask_
from sparsekern.backends.triton.steps import row_statistics_ as row_statistics_
from sparsekern.backends.triton.steps import sgd_step_ as sgd_step_
