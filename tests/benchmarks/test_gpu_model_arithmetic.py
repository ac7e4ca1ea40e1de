"""What benchmarks.gpu_model computes from addresses, sizes and machine code, on cases that are known."""

import shutil
import subprocess

import numpy as np
import pytest

from benchmarks.gpu_model import access, occupancy
from benchmarks.gpu_model.devices import DEVICES
from tests.ptx.sources import COMPILER
from tests.sass import NVCC

WARP = np.arange(32)


@pytest.mark.parametrize(
    "addresses, width, threads, expected",
    [
        (4 * WARP, 4, WARP, (4, 1, 128, 0)),
        (16 * WARP, 16, WARP, (16, 4, 512, 0)),
        (2 * WARP, 2, WARP, (2, 1, 64, 0)),
        (0 * WARP, 4, WARP, (1, 1, 4, 1)),
        (256 * WARP, 2, WARP, (32, 32, 64, 32)),  # a sector for 2 bytes
        (np.concatenate([4 * WARP, 4 * WARP]), 4, np.arange(64), (8, 2, 256, 0)),  # two warps do not share
        (4 * WARP[:10] + 16, 4, WARP[:10], (2, 1, 40, 2)),
    ],
)
def test_sectors_lines_useful_and_partial(addresses, width, threads, expected):
    sectors, useful = (
        access.sectors(addresses + (1 << 40), threads),
        access.useful(addresses + (1 << 40), width, threads),
    )
    found = len(sectors), access.lines_of(sectors), width * len(useful), access.partial(useful, width)
    assert found == expected and access.warps_in(sectors) == len(set(threads // 32))
    assert access.places_of(sectors, 1 << 39).tolist() == [0, 0, expected[0]]


@pytest.mark.parametrize(
    "addresses, width, threads, expected",
    [
        (4 * WARP, 4, WARP, 1),
        (8 * WARP, 4, WARP, 2),
        (128 * WARP, 4, WARP, 32),
        (0 * WARP, 4, WARP, 1),  # all want the same word
        (2 * WARP, 2, WARP, 1),
        (8 * WARP, 8, WARP, 2),
        (16 * WARP, 16, WARP, 4),
        (256 * WARP, 16, WARP, 32),
        (144 * WARP, 16, WARP, 4),  # rows an odd number of 16 bytes apart
        (4 * (17 * (WARP % 4 * 2) + WARP // 4), 4, WARP, 4),  # lanes of a fragment in rows of 17 words
        (4 * (20 * (WARP % 4 * 2) + WARP // 4), 4, WARP, 1),
        (np.concatenate([4 * WARP, 128 * WARP]), 4, np.arange(64), 33),
        (np.concatenate([8 * WARP[:4], 128 * WARP[:4]]), 8, np.concatenate([WARP[:4], 16 + WARP[:4]]), 5),
    ],
)
def test_wavefronts(addresses, width, threads, expected):
    assert access.wavefronts(addresses, width, threads) == expected
    assert access.fewest_wavefronts(width, threads) <= expected


@pytest.mark.parametrize(
    "device, warps, registers, shared, expected",
    [
        ("a100", 8, 32, 0, 8),
        ("a100", 8, 33, 0, 6),
        ("a100", 8, 255, 0, 1),
        ("h100", 6, 98, 62 << 10, 2),  # four warps of a scheduler: 16, and not 19 by all registers together
        ("h100", 12, 113, 143 << 10, 1),
        ("h100", 1, 16, 0, 32),
        ("a100", 4, 32, 80 << 10, 2),
        ("a100", 4, 32, 82 << 10, 1),  # with what the driver takes
        ("a100", 4, 32, 200 << 10, 0),
    ],
)
def test_blocks_per_multiprocessor(device, warps, registers, shared, expected):
    assert occupancy.blocks_per_multiprocessor(DEVICES[device], warps, registers, shared) == expected


CALCULATOR = """
#include <cstdio>
#include <cstdlib>
#include <cuda_occupancy.h>
int main(int, char** arguments) {
  int number[6];
  for (int i = 0; i < 6; ++i) number[i] = std::atoi(arguments[i + 1]);
  cudaOccDeviceProp device;
  device.computeMajor = number[0], device.computeMinor = 0;
  device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32, device.numSms = 100;
  device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = number[1];
  device.sharedMemPerBlockOptin = number[2], device.reservedSharedMemPerBlock = 1024;
  int warps, registers, shared;
  while (std::scanf("%d %d %d", &warps, &registers, &shared) == 3) {
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024, function.numRegs = registers, function.sharedSizeBytes = 0;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, function.maxDynamicSharedSizeBytes = number[2];
    cudaOccDeviceState state;
    cudaOccResult result;
    const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, 32 * warps, shared);
    std::printf("%d\\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.parametrize("device", ["a100", "h100"])
def test_occupancy_is_what_nvidia_calculates(device, tmp_path):
    if NVCC is None or shutil.which(COMPILER) is None:
        pytest.skip("wants cuda_occupancy.h and a C++ compiler")
    source, program, gpu = tmp_path / "calculate.cpp", tmp_path / "calculate", DEVICES[device]
    source.write_text(CALCULATOR)
    subprocess.run([COMPILER, f"-I{NVCC.home}/include", str(source), "-o", str(program)], check=True)
    cases = [
        (warps, registers, shared)
        for warps in (1, 2, 4, 6, 8, 12, 16, 32)
        for registers in (16, 32, 40, 57, 64, 98, 113, 128, 168, 210, 255)
        for shared in (0, 1000, 20 << 10, 62 << 10, 80 << 10, 143 << 10)
    ]
    sizes = [str(gpu.capability // 10), str(gpu.shared), str(gpu.shared_of_block), "0", "0", "0"]
    given = "\n".join(" ".join(map(str, case)) for case in cases)
    done = subprocess.run([program, *sizes], input=given, capture_output=True, text=True, check=True)
    expected = list(map(int, done.stdout.split()))
    assert [occupancy.blocks_per_multiprocessor(gpu, *case) for case in cases] == expected
