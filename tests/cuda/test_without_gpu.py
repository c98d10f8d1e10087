"""The CUDA library as nvcc built it, where there is no GPU: it loads, and every call ends with an error."""

from __future__ import annotations

import ctypes

from sparsekern.kernels.native import cuda_library


def test_without_a_gpu_the_library_answers_with_an_error() -> None:
    library = cuda_library.load()
    assert library is not None
    code = library.sparsekern_cuda_try(0)
    assert code > 0
    assert f"(CUDA error {code})" in cuda_library.error_text(library, code)
    shape, cut = cuda_library.Shape(1, 100, 9, 0), cuda_library.Cut()
    assert library.sparsekern_cuda_cut(ctypes.byref(shape), 1, 4, ctypes.byref(cut)) == 0
    assert cut.chunks * cut.row_step >= 100
    address = (ctypes.c_uint64 * 14)(*[64] * 14)
    call = cuda_library.Call(
        shapes=ctypes.addressof(shape), cuts=ctypes.addressof(cut), addresses=bytes(address), tensors=1
    )
    assert library.sparsekern_cuda_step(call) == code
    norm = cuda_library.Norm(
        **dict.fromkeys(("x", "out", "mean", "var", "scratch"), 64), outer=1, channels=8, inner=9
    )
    norm.training = 1
    assert library.sparsekern_cuda_norm_forward(norm) == code
