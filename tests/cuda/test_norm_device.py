"""The CUDA kernels of normalisation with its activation, on a GPU; collected where there is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernels.norm_elementwise import assert_backward, assert_forward
from torch import Tensor, nn

from sparsekern.kernels.backends import cuda
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.options import Moments, NormInputs, Running
from sparsekern.kernels.selfcheck.norms import FORMATS, problem
from sparsekern.nn import NormAct2d

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda:0")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, (NormInputs, Running, Moments)):
        return type(value)(*(_moved(entry, device) for entry in value))
    return value.to(device) if isinstance(value, Tensor) else value


class _OnDevice:
    """The backend for operands on the CPU, which it moves there and back."""

    def norm_act_forward(self, *arguments: Any) -> tuple[Any, ...]:
        found = cuda.norm_act_forward(*[_moved(argument, DEVICE) for argument in arguments])
        return tuple(_moved(tensor, torch.device("cpu")) for tensor in found)

    def norm_act_backward(self, *arguments: Any) -> tuple[Any, ...]:
        *operands, counts = arguments
        moved = ChannelCounts.of([a.to(DEVICE) for a in counts.arrays], counts.tau, counts.decay)
        found = cuda.norm_act_backward(*[_moved(operand, DEVICE) for operand in operands], moved)
        for mine, theirs in zip(counts.arrays, moved.arrays, strict=True):
            mine.copy_(theirs)
        return tuple(_moved(tensor, torch.device("cpu")) for tensor in found)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parity(activation: str, dtype: torch.dtype, memory: str) -> None:
    assert cuda_library.why_not() is None, cuda_library.why_not()
    for shape, residual in (((3, 9, 5, 3), True), ((37, 40, 17, 9), False)):
        given = problem(
            shape, dtype, memory, activation, residual=residual, masked=0.3 * residual, training=residual
        )
        assert_forward(_OnDevice(), given)
        assert_backward(_OnDevice(), given)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(NormAct2d(24), NormAct2d(24, activation="silu")).to(DEVICE)
    for norm in network:
        norm.counts = ChannelCounts.zeros(24, DEVICE)
    return network


def _pass(network: nn.Sequential, x: Tensor) -> None:
    network.zero_grad(set_to_none=False)
    network(x).square().mean().backward()


def _tensors(network: nn.Sequential) -> list[Tensor]:
    counts = [array for norm in network for array in norm.counts.arrays]
    return [*[p.grad for p in network.parameters()], *network.buffers(), *counts]


def test_nothing_waits_and_a_captured_pass_is_the_same() -> None:
    x = torch.randn(8, 24, 33, 35, device=DEVICE)
    network = _network()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _pass(network, x)
    torch.cuda.current_stream().wait_stream(side)
    eager = copy.deepcopy(network)
    for mine, theirs in zip(eager.parameters(), network.parameters(), strict=True):
        assert theirs.grad is not None
        mine.grad = theirs.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _pass(network, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            _pass(eager, x)
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, theirs in zip(_tensors(network), _tensors(eager), strict=True):
        assert torch.equal(mine, theirs)
