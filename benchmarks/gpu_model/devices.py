"""What the GPUs can do that the model predicts for, and where the figures come from.

Sizes of a multiprocessor: CUDA C++ programming guide, "Compute capabilities". Lanes: the same, "Arithmetic
instructions": results a clock and a multiprocessor. Multiprocessors, memory, matrix products without sparsity: NVIDIA's
data sheets of the A100 80 GB SXM, H100 SXM and H200 SXM. What data sheets do not say is in ASSUMED.
"""

from dataclasses import dataclass

ASSUMED = {
    "clock": "A100: its boost clock, which it holds. H100 and H200: 1.7 GHz, between the 1.83 GHz of the data sheet's "
    "peak and what a card at its limit of power falls to",
    "copy": "A large copy reaches 90 % of the memory's rate",
    "L2": "60 % of 5120 bytes a clock, about what microbenchmarks read (Chips and Cheese, Nvidia's H100, 2023)",
    "mma.sync": "On Hopper 62 % of the rate of wgmma (Luo and others, arXiv 2501.12084)",
}

SCHEDULERS = 4  # of a multiprocessor, each issues one warp instruction a clock
REGISTERS = 65536  # of a multiprocessor
COPY_SHARE = 0.9


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
_HOPPER = _AMPERE | {"fp32": 128}


def _hopper(name: str, memory: float) -> Device:
    clock = 1.7e9
    matrix = 132 * 4096 * clock
    return Device(
        name, 90, 132, clock, memory, 0.6 * 5120 * clock, matrix, 0.62 * matrix, _HOPPER, 228 << 10, 227 << 10
    )


DEVICES = {
    "a100": Device(
        "A100", 80, 108, 1.41e9, 2.039e12, 0.6 * 5120 * 1.41e9, 312e12, 312e12, _AMPERE, 164 << 10, 163 << 10
    ),
    "h100": _hopper("H100", 3.35e12),
    "h200": _hopper("H200", 4.8e12),
}
