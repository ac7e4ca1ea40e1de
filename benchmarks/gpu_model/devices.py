"""What the GPUs can do that the model predicts for, and where the figures come from.

Sizes of a multiprocessor: CUDA C++ programming guide, "Compute capabilities". Lanes: the same, "Arithmetic
instructions": results a clock and a multiprocessor. Multiprocessors, memory, matrix products without sparsity: NVIDIA's
data sheets of the A100 80 GB SXM, H100 SXM and H200 SXM. Assumed, because data sheets do not say it:

- the clock: an A100 holds its boost clock; 1.7 GHz for H100 and H200 lies between the 1.83 GHz of the data sheet's peak
  and what a card at its limit of power falls to;
- a large copy reaches COPY_SHARE of the memory's rate;
- L2 delivers L2_SHARE of 5120 bytes a clock: more than was read of an H100 PCIe at its limit of power (Chips and
  Cheese, "Nvidia's H100", 2023), as much as tiled products are known to need;
- on Hopper, mma.sync reaches SYNC_SHARE of the rate of wgmma (Luo and others, arXiv 2501.12084);
- the products that a host leaves to PyTorch, cuBLAS in fact, reach LIBRARY_SHARE of the rate of the tensor cores or, in
  float32, of the floating-point units, whatever their sizes.
"""

from dataclasses import dataclass

L2_SHARE = 0.75
COPY_SHARE = 0.9
SYNC_SHARE = 0.62
LIBRARY_SHARE = 0.7
SCHEDULERS = 4  # of a multiprocessor, each issues one warp instruction a clock
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Device:
    name: str
    capability: int
    multiprocessors: int
    clock: float  # Hz
    memory: float  # bytes/s
    l2: float  # bytes/s
    matrix: float  # FLOP/s, float16 and bfloat16
    matrix_sync: float  # of which mma.sync reaches
    lanes: dict[str, int]  # of a multiprocessor, by pipe
    shared: int  # bytes of a multiprocessor
    shared_of_block: int
    warps: int = 64
    blocks: int = 32

    @property
    def fp32(self) -> float:
        """FLOP/s."""
        return 2 * self.lanes["fp32"] * self.multiprocessors * self.clock

    @property
    def copy(self) -> float:
        """Bytes/s, read and written together."""
        return COPY_SHARE * self.memory


_AMPERE = {"fp32": 64, "alu": 64, "special": 16, "shuffle": 32}
_L2 = L2_SHARE * 5120  # bytes a clock


def _ampere() -> Device:
    clock, matrix = 1.41e9, 312e12
    rates = 2.039e12, _L2 * clock, matrix, matrix
    return Device("A100", 80, 108, clock, *rates, _AMPERE, shared=164 << 10, shared_of_block=163 << 10)


def _hopper(name: str, memory: float) -> Device:
    clock, count = 1.7e9, 132
    matrix, lanes = count * 4096 * clock, _AMPERE | {"fp32": 128}
    rates = memory, _L2 * clock, matrix, SYNC_SHARE * matrix
    return Device(name, 90, count, clock, *rates, lanes, shared=228 << 10, shared_of_block=227 << 10)


DEVICES = {
    "a100": _ampere(),
    "h100": _hopper("H100", 3.35e12),
    "h200": _hopper("H200", 4.8e12),
}
