"""benchmarks.gpu_model's counts of a small kernel, whose loop, sectors and bank conflicts are known."""

import importlib.util

import pytest
import torch

from benchmarks.gpu_model import issue, machine_code
from benchmarks.gpu_model.counts import Counting
from benchmarks.gpu_model.record import Recorder
from tests.ptx.launch import launch
from tests.ptx.memory import Memory
from tests.ptx.parse import parse

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="ptxas comes with Triton")
WARPS, STEPS, BLOCKS = 2, 5, 7

# Every thread loads every other number, stores it into every other word of shared memory, loads that of its neighbour,
# and stores it beside its block's others.
PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry work(.param .u64 from, .param .u64 to, .param .u32 steps)
{
  .reg .pred %p<2>;
  .reg .b32 %r<12>;
  .reg .f32 %f<4>;
  .reg .b64 %rd<8>;
  .shared .align 16 .b8 memory[512];
  ld.param.u64 %rd1, [from];
  ld.param.u64 %rd2, [to];
  ld.param.u32 %r1, [steps];
  mov.u32 %r2, %tid.x;
  mov.u32 %r9, %ctaid.x;
  mad.lo.s32 %r10, %r9, 64, %r2;
  mul.wide.u32 %rd3, %r10, 8;
  add.s64 %rd4, %rd1, %rd3;
  mul.wide.u32 %rd5, %r10, 4;
  add.s64 %rd6, %rd2, %rd5;
  shl.b32 %r3, %r2, 3;
  xor.b32 %r4, %r3, 8;
  mov.u32 %r5, memory;
  add.s32 %r6, %r5, %r3;
  add.s32 %r7, %r5, %r4;
  mov.u32 %r8, 0;
$again:
  ld.global.f32 %f1, [%rd4];
  ex2.approx.f32 %f2, %f1;
  st.shared.f32 [%r6], %f2;
  bar.sync 0;
  ld.shared.f32 %f3, [%r7];
  bar.sync 0;
  st.global.f32 [%rd6], %f3;
  add.s32 %r8, %r8, 1;
  setp.lt.s32 %p1, %r8, %r1;
  @%p1 bra $again;
  ret;
}
"""


def code() -> machine_code.MachineCode:
    return machine_code.assemble(PTX, "work", 80, machine_code.tool("ptxas"), machine_code.tool("nvdisasm"))


def arguments():
    memory, numbers = Memory(), torch.zeros(BLOCKS * WARPS * 32 * 2)
    out = torch.empty(BLOCKS * WARPS * 32)
    return [memory.allow(numbers), memory.allow(out), STEPS], memory, (numbers, out)


def test_what_a_block_issues_and_moves():
    given, memory, tensors = arguments()
    counting = Counting(memory.storages, WARPS, BLOCKS)
    launch(parse(PTX)["work"], given, (BLOCKS, 1, 1), 32 * WARPS, memory=memory, late=False, observers=[counting])
    counts, times = counting.finished(), BLOCKS * WARPS * STEPS
    load, store = counts.of("global", "load"), counts.of("global", "store")
    assert (load.accesses, load.sectors, load.lines, load.useful) == (times, 8 * times, 2 * times, 128 * times)
    assert (store.accesses, store.sectors, store.partial, store.useful) == (times, 4 * times, 0, 128 * times)
    assert (counts.through_l1, counts.past_l1) == (8 * BLOCKS * WARPS, 4 * times)  # the same in every step
    on_chip = counts.of("shared")
    assert (on_chip.wavefronts, on_chip.without_conflicts) == (4 * times, 2 * times)
    starts = [first for first, _ in memory.storages]
    ways = {starts.index(tensors[0].data_ptr()): ("load", 256), starts.index(tensors[1].data_ptr()): ("store", 128)}
    assert counts.storages == {(place, way): moved * times for place, (way, moved) in ways.items()}
    found = issue.issued(code(), counts.lines, counts.opcodes)
    assert (found["global"], found["shared"]) == (2 * times, 2 * times)
    assert times <= found["special"] <= 2 * times and found["matrix"] == found["shuffle"] == 0
    assert found["alu"] >= times and sum(found.values()) <= 20 * times + 40 * BLOCKS * WARPS


def test_only_the_first_blocks_are_counted():
    given, memory, _ = arguments()
    counting = Counting(memory.storages, WARPS, 3)
    launch(parse(PTX)["work"], given, (BLOCKS, 1, 1), 32 * WARPS, memory=memory, late=False, observers=[counting])
    assert counting.finished().of("global", "store").sectors == 4 * 3 * WARPS * STEPS


def test_facts_of_machine_code():
    found = code()
    assert 8 <= found.registers <= 32 and (found.spilled, found.shared) == (0, 512)
    copies = [each.kind for each in found.instructions].count("global") / 2
    assert copies > 1, "ptxas unrolls the loop, which is what the counts of instructions have to bear"


def test_a_launch_of_which_some_blocks_run():
    given, memory, tensors = arguments()
    recorder = Recorder(lambda kernel: code())
    recorder(parse(PTX)["work"], given, (BLOCKS,), (32 * WARPS, 1, 1), memory=memory)
    (found,) = recorder.launches
    times = BLOCKS * WARPS * STEPS
    assert (found.kernel, found.blocks, found.warps, found.shared) == ("work", BLOCKS, WARPS, 512)
    assert (found.sectors, found.wavefronts) == (12 * times, 4 * times)
    assert (found.read, found.written) == tuple(each.nbytes for each in tensors)  # each step after the first in L2
