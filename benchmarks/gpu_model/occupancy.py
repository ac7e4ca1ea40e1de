"""How many blocks of a kernel a multiprocessor holds, as NVIDIA's cuda_occupancy.h has it."""

from benchmarks.gpu_model.devices import REGISTERS, SCHEDULERS, Device

_REGISTERS_AT_ONCE = 256  # a warp gets a multiple
_SHARED_AT_ONCE = 128
_SHARED_RESERVED = 1024  # of each block, by the driver


def blocks_per_multiprocessor(device: Device, warps: int, registers: int, shared: int) -> int:
    """0 where not even one fits. Args: of a block, of a thread, bytes of a block."""
    of_warp = _up(32 * registers, _REGISTERS_AT_ONCE)
    if shared > device.shared_of_block or of_warp * _up(warps, SCHEDULERS) > REGISTERS:
        return 0
    warps_by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS
    of_block = _up(shared + _SHARED_RESERVED, _SHARED_AT_ONCE)
    return min(device.blocks, device.warps // warps, warps_by_registers // warps, device.shared // of_block)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
