"""The time that each resource of a GPU would take for a launch, and what that makes of a call.

What is assumed, and not known before a GPU has run this:

- A warp issues once in LATENCY clocks on average, what it waits for between included, and barriers keep all schedulers
  of a multiprocessor from being busy for more than ISSUED of the time. (Read off review of the same kernels: 40 to 50 %
  of the slots at 8 warps a multiprocessor, 65 % at 12 and more. Kernels without a serial chain do better.)
- Resources work at the same time, but the nearer two limits are to each other, the less of it: the time of a launch is
  the limits' norm of degree OVERLAP.
- Blocks are equal, and the multiprocessor that gets one block more than the others decides ("uneven").
- Shared memory, shuffles and what L1 loads and stores share a path of 128 bytes a clock.
- L1 keeps what a block loads, but for copies past it, so that L2 delivers each sector to a block once; L2 keeps what
  several blocks load, so that memory delivers each byte of a tensor once a launch, at the rate of a copy. A sector that
  a store covers in part costs L2 twice.
- A launch begins LAUNCH after the one before it has ended, as in a replayed CUDA graph.

They are good for +-30 %, until a record says more.
"""

from dataclasses import asdict, dataclass, field
from math import ceil

from benchmarks.gpu_model.access import SECTOR
from benchmarks.gpu_model.devices import LIBRARY_SHARE, SCHEDULERS, Device
from benchmarks.gpu_model.occupancy import blocks_per_multiprocessor

LATENCY = 4.5  # clocks
ISSUED = 0.65
OVERLAP = 4
LAUNCH = 1e-6  # s
_WARP = 32


@dataclass(frozen=True)
class Launch:
    """A launch in numbers; those of a whole grid, but for what is a block's or a thread's.

    instructions: warp instructions of the machine code by kind. sectors: of 32 bytes, of each access of a warp;
    through_l2: those that L1 does not have already; partial: stored in part; useful: bytes of them; lines: of 128 bytes
    that L1 looks up, copied_lines for copies into shared memory; wavefronts: clocks of shared memory; read, written:
    bytes of global memory. An operation of PyTorch's has bytes alone, a product its operations, too.
    """

    kernel: str
    read: float
    written: float
    blocks: int = 0
    warps: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: dict[str, float] = field(default_factory=dict)
    ptx: float = 0  # without moves
    accesses: float = 0
    sectors: float = 0
    through_l2: float = 0
    partial: float = 0
    useful: float = 0
    lines: float = 0
    copied_lines: float = 0
    wavefronts: float = 0
    without_conflicts: float = 0
    flops: dict[str, float] = field(default_factory=dict)

    @property
    def issued(self) -> float:
        return sum(self.instructions.values())


@dataclass(frozen=True)
class Limits:
    """seconds: what each resource takes for a launch on a GPU, were it alone."""

    seconds: dict[str, float]
    blocks_per_multiprocessor: int = 0
    waves: float = 0.0
    issue_share: float = 1.0

    @property
    def binding(self) -> str:
        return max(self.seconds, key=self.seconds.get)

    @property
    def predicted(self) -> float:
        return sum(t**OVERLAP for t in self.seconds.values()) ** (1 / OVERLAP) + LAUNCH


def limits(launch: Launch, device: Device) -> Limits:
    memory = {"memory": (launch.read + launch.written) / device.copy}
    matrix = launch.flops.get("wgmma.mma_async", 0) / device.matrix + launch.flops.get("mma", 0) / device.matrix_sync
    matrix += launch.flops.get("fp32", 0) / device.fp32
    if launch.blocks == 0:
        return Limits(memory | ({"matrix products": matrix / LIBRARY_SHARE} if matrix else {}))
    resident = blocks_per_multiprocessor(device, launch.warps, launch.registers, launch.shared)
    if resident == 0:
        raise ValueError(f"{launch.kernel}: a block does not fit on a multiprocessor of {device.name}")
    share = issue_share(min(resident, ceil(launch.blocks / device.multiprocessors)) * launch.warps)
    count, clocks = launch.instructions, device.clock * device.multiprocessors / uneven(launch.blocks, device)
    pipes = {pipe: count.get(pipe, 0) * _WARP / lanes for pipe, lanes in device.lanes.items() if pipe != "shuffle"}
    busy = {
        "issue": launch.issued / SCHEDULERS / share,
        **pipes,
        "L1 lookups": launch.lines,
        "shared memory": launch.wavefronts + launch.lines - launch.copied_lines + count.get("shuffle", 0),
    }
    seconds = {name: value / clocks for name, value in busy.items()}
    seconds["matrix products"] = matrix * uneven(launch.blocks, device)
    seconds["L2"] = SECTOR * (launch.through_l2 + launch.partial) / device.l2
    waves = launch.blocks / device.multiprocessors / resident
    return Limits(seconds | memory, resident, waves, share)


def issue_share(warps: float) -> float:
    """Of the issue slots of a multiprocessor with so many warps."""
    return min(ISSUED, warps / SCHEDULERS / LATENCY)


def uneven(blocks: int, device: Device) -> float:
    """Blocks of the multiprocessor with the most, by the average."""
    return ceil(blocks / device.multiprocessors) * device.multiprocessors / blocks


@dataclass(frozen=True)
class Prediction:
    """Of a call, all its launches together. share: of the time that a copy of the bytes that must move would take."""

    seconds: float
    share: float
    binding: str  # in the launch that takes longest

    @staticmethod
    def of(launches: list[Launch], device: Device, must_move: float) -> "Prediction":
        found = [limits(launch, device) for launch in launches]
        seconds = sum(each.predicted for each in found)
        longest = max(found, key=lambda each: each.predicted)
        return Prediction(seconds, must_move / device.copy / seconds, longest.binding)

    def as_dict(self) -> dict:
        return asdict(self)
