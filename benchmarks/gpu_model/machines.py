"""The GPUs of the prediction: published figures, with their sources, and what is assumed.

Sources:

* Multiprocessors, bandwidth, clock: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, and for
  B200 chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut (148 multiprocessors, 8 TB/s).
* Registers, threads, blocks and shared memory per multiprocessor: CUDA C++ Programming Guide, table of
  technical specifications per compute capability. Registers are allocated to a warp in units of 256.
* Results per clock and multiprocessor: the same guide, table of the throughput of arithmetic instructions.
* Latency of memory in clocks, without load: Benchmarking and Dissecting the Nvidia Hopper GPU Architecture
  (arXiv:2402.13499), A100 466 and H100 479 clocks. For H200 and B200 that of H100 is assumed.
* Bytes in flight that saturate the memory: `arch_to_min_bytes_in_flight` of CUB (NVIDIA/cccl), which NVIDIA
  tuned with streaming kernels: 16 KB per multiprocessor on A100, 32 KB on H100, 48 KB on H200, 64 KB on B200.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Figures of one GPU.

    Attributes:
        name: name of the product.
        architecture: of the machine code that it runs.
        multiprocessors: their number.
        bandwidth: of the memory, in bytes per second, as published.
        clock: clocks per second.
        float32_lanes: float32 results per clock and multiprocessor.
        float64_lanes: float64 results per clock and multiprocessor.
        shared: bytes of shared memory per multiprocessor.
        latency: clocks from a load to its result, without other load on the memory.
        saturating: bytes of loads in flight per multiprocessor that saturate the memory.
    """

    name: str
    architecture: str
    multiprocessors: int
    bandwidth: float
    clock: float
    float32_lanes: int
    float64_lanes: int
    shared: int
    latency: float
    saturating: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32

    @property
    def latencies(self) -> tuple[float, float]:
        """The least and the largest latency of memory under load, in clocks.

        The least is assumed to be twice that without load. The largest follows from Little's law: with it the
        bytes that saturate the memory are latency * bandwidth.
        """
        per_clock = self.bandwidth / self.multiprocessors / self.clock
        return 2 * self.latency, max(2 * self.latency, self.saturating / per_clock)


MACHINES = (
    Machine("A100 80GB", "sm_80", 108, 2.039e12, 1.410e9, 64, 32, 164 << 10, 466, 16 << 10),
    Machine("H100 SXM", "sm_90", 132, 3.35e12, 1.755e9, 128, 64, 228 << 10, 479, 32 << 10),
    Machine("H200 SXM", "sm_90", 132, 4.8e12, 1.755e9, 128, 64, 228 << 10, 479, 48 << 10),
    Machine("B200", "sm_100", 148, 8.0e12, 1.755e9, 128, 64, 228 << 10, 479, 64 << 10),
)

STREAM = 0.92
"""Share of the published bandwidth that a plain stream is assumed to reach. The prediction is over the
stream."""

WARP = 32
SCHEDULERS = 4
"""Instructions of warps that a multiprocessor issues per clock."""

OTHER_LANES = {"integer": 64, "special": 16, "float64 conversions": 16}
"""Results per clock and multiprocessor of the other kinds of instructions, on all of these GPUs."""

CLOCKS_PER_INSTRUCTION = 2.0
"""Assumed: clocks between two instructions of one warp. A result can be used after 4 clocks, and about every
other instruction waits for the one before it."""

FLOAT64_CLOCKS = 16.0
"""Assumed: clocks from one float64 instruction to the next that uses its result."""

CONSTANT_CLOCKS = 100.0
"""Assumed: clocks of a load from the kernel's arguments at an index that depends on the load before it."""

SHUFFLE_CLOCKS = 30.0
"""Assumed: clocks of one exchange between the threads of a warp, with the addition behind it."""

BARRIER_CLOCKS = 50.0
"""Assumed: clocks of a barrier of a block."""

LAUNCH_SECONDS = 2e-6
"""Assumed: time from the end of one kernel to the start of the next one in its stream, or of the first
one."""
